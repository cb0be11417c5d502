"""Which target a compilation gets, and whether that target can run here."""

from __future__ import annotations

import importlib.util

import torch

from gcu_compile.errors import TargetUnavailableError, UnknownNameError
from gcu_compile.targets import emulator

TARGETS = ("host", "cuda", "gcu300", "gcu400")
BY_DEVICE = {"cpu": "host", "cuda": "cuda"}


def has_torch_gcu() -> bool:
    """Whether the vendor's torch_gcu is installed; it is not imported."""
    return importlib.util.find_spec("torch_gcu") is not None


def gcu_target() -> str | None:
    """`gcu300` or `gcu400`: the card that `torch.device("gcu")` is in this process, emulated or real; None: neither."""
    emulated = emulator.card()
    if emulated is not None:
        return emulated.target
    module = getattr(torch, "gcu", None) if has_torch_gcu() else None
    if module is None:
        return None
    capability = module.get_device_capability()
    major = capability[0] if isinstance(capability, (tuple, list)) else capability
    # The runtime says 3 for S60; vllm-gcu adds 10 to it, or writes 130.
    return "gcu300" if str(major).lstrip("1")[:1] == "3" else "gcu400"


def check_target(target: str, serves: str, supported: tuple[str, ...] = TARGETS) -> None:
    """Raise unless `target` is a target, one that `serves` supports, and one whose device is here.

    Raises:
        UnknownNameError: no such target.
        TargetUnavailableError: no device, or not supported for this use; the message says what to do.
    """
    if target not in TARGETS:
        raise UnknownNameError("target", target, ("auto", *TARGETS))
    if target.startswith("gcu"):
        here = gcu_target()
        if here is None:
            raise TargetUnavailableError(
                f"target {target!r} needs torch_gcu, which is not installed. Install the vendor's torch-gcu on a "
                f"machine with a card, emulate one (GCU_COMPILE_EMULATE={target}), or choose target 'host' "
                "(GCU_COMPILE_TARGET=host)."
            )
        if here != target:
            raise TargetUnavailableError(f"target {target!r} was asked for, and the card here is {here!r}.")
    if target == "cuda" and not torch.cuda.is_available():
        raise TargetUnavailableError(
            "target 'cuda' needs an NVIDIA GPU and a CUDA build of torch; neither is here. Choose target 'host'."
        )
    if target not in supported:
        raise TargetUnavailableError(
            f"target {target!r} is not supported for {serves}. Supported: {', '.join(supported)}."
        )


def target_of(requested: str, inputs) -> str:
    """The target of a graph: the one asked for, else the one of the first tensor's device.

    Args:
        requested: option `target`.
        inputs: example inputs of the graph; what is not a tensor is passed over.
    """
    if requested != "auto":
        return requested
    devices = [value.device.type for value in inputs if isinstance(value, torch.Tensor)]
    device = next(iter(devices), "cpu")
    if device == "gcu" and (here := gcu_target()) is not None:
        return here
    if device not in BY_DEVICE:
        raise TargetUnavailableError(
            f"no target for tensors on {device!r}. Devices with one: {', '.join(BY_DEVICE)}; or name a target."
        )
    return BY_DEVICE[device]
