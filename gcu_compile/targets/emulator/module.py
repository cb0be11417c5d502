"""What `torch.gcu` is on an emulated card: the vendor's names on PyTorch's own accelerator functions."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import OutOfMemoryError  # noqa: F401  (torch.gcu.OutOfMemoryError)
from torch.accelerator import (
    current_stream,
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_peak_memory_stats,
    set_stream,
    synchronize,
)

from gcu_compile.targets import emulator

__all__ = [
    "current_stream",
    "empty_cache",
    "max_memory_allocated",
    "max_memory_reserved",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_peak_memory_stats",
    "set_stream",
    "synchronize",
]
Stream = torch.Stream
Event = torch.Event

# Exactly the fields of the vendor's: what asks for others (gcnArchName, warp_size) breaks on a card.
_GcuDeviceProperties = namedtuple(
    "_GcuDeviceProperties",
    (
        "name",
        "major",
        "minor",
        "multi_processor_count",
        "total_memory",
        "max_threads_per_multi_processor",
        "sip_count",
    ),
)


def init() -> None:
    """Nothing has to be done."""


def is_initialized() -> bool:
    """Always, once the module is there."""
    return True


def is_available() -> bool:
    """Whether a card is visible."""
    return device_count() > 0


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    """Emulated cards."""
    return emulator.card().count


def current_device() -> int:
    """Index of the current card."""
    return torch.accelerator.current_device_index()


def set_device(device: Any) -> None:
    """Make a card current; a negative index changes nothing, as in torch.cuda."""
    index = _index(device)
    if index >= 0:
        torch.accelerator.set_device_index(index)


def _index(device: Any = None) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "gcu":
        raise ValueError(f"Expected a gcu device, but got: {device}")
    return current_device() if device.index is None else device.index


class device:
    """Context manager: the given card is current inside."""

    def __init__(self, device: Any):
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before = current_device()
        set_device(self.index)

    def __exit__(self, *error: Any) -> bool:
        set_device(self.before)
        return False


_DeviceGuard = device


class device_of(device):
    """Context manager: the card of the given tensor is current inside."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__(tensor.device if tensor.device.type == "gcu" else -1)


class stream:
    """Context manager: the given stream is current inside; None changes nothing."""

    def __init__(self, stream: torch.Stream | None):
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.before = current_device(), current_stream(self.stream.device)
            set_stream(self.stream)

    def __exit__(self, *error: Any) -> bool:
        if self.stream is not None:
            index, old = self.before
            set_stream(old)
            set_device(index)
        return False


def default_stream(device: Any = None) -> torch.Stream:
    """Stream 0 of a card."""
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=current_stream().device_type)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of a card."""
    return torch.accelerator.get_memory_info(_index(device))


def get_device_properties(device: Any = None) -> _GcuDeviceProperties:
    """What the runtime says of a card; from the target profile."""
    index = _index(device)
    if not 0 <= index < device_count():
        raise AssertionError(f"Invalid device id {index}; there are {device_count()} emulated cards")
    profile = emulator.card().profile
    major, minor = divmod(profile.value("device_capability") - 100, 10)  # vllm-gcu's number is 100 higher
    return _GcuDeviceProperties(
        name=f"{emulator.card().target} (emulated in host memory)",
        major=major,
        minor=minor,
        multi_processor_count=profile.value("cluster_count") or 1,
        total_memory=profile.value("dram_bytes"),
        max_threads_per_multi_processor=profile.value("max_warps"),
        sip_count=profile.value("sip_count"),
    )


def get_device_name(device: Any = None) -> str:
    """Says that it is emulated."""
    return get_device_properties(device).name


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """(3, 0) on gcu300, (4, 0) on gcu400."""
    properties = get_device_properties(device)
    return properties.major, properties.minor


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """As the profile says."""
    return "bf16" in emulator.card().profile.value("dtypes")


def get_amp_supported_dtype() -> list[torch.dtype]:
    """For autocast."""
    return [torch.float16, torch.bfloat16]


def _generator(index: int) -> torch.Generator:
    return torch.ops.gcu_emulator.default_generator(index)


def manual_seed(seed: int) -> None:
    """Seed the current card's generator."""
    _generator(current_device()).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed every card's generator; torch.manual_seed calls this."""
    for index in range(device_count()):
        _generator(index).manual_seed(int(seed))


def initial_seed() -> int:
    """The current card's seed."""
    return _generator(current_device()).initial_seed()


def get_rng_state(device: Any = "gcu") -> torch.Tensor:
    """State of a card's generator."""
    return _generator(_index(device)).get_state()


def set_rng_state(state: torch.Tensor, device: Any = "gcu") -> None:
    """Restore a state of a card's generator."""
    _generator(_index(device)).set_state(state)
