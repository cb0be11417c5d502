"""Which target a compilation gets, and whether that target can run here."""

from __future__ import annotations

import importlib.util

import torch

from gcu_compile.errors import TargetUnavailableError, UnknownNameError

TARGETS = ("host", "cuda", "gcu300", "gcu400")
BY_DEVICE = {"cpu": "host", "cuda": "cuda"}


def has_torch_gcu() -> bool:
    """Whether the vendor's torch_gcu is installed; it is not imported."""
    return importlib.util.find_spec("torch_gcu") is not None


def check_target(target: str, serves: str, supported: tuple[str, ...] = TARGETS) -> None:
    """Raise unless `target` is a target, one that `serves` supports, and one whose device is here.

    Raises:
        UnknownNameError: no such target.
        TargetUnavailableError: no device, or not supported for this use; the message says what to do.
    """
    if target not in TARGETS:
        raise UnknownNameError("target", target, ("auto", *TARGETS))
    if target.startswith("gcu") and not has_torch_gcu():
        raise TargetUnavailableError(
            f"target {target!r} needs torch_gcu, which is not installed. Install the vendor's torch-gcu on a "
            "machine with a card, or choose target 'host' (GCU_COMPILE_TARGET=host)."
        )
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
    if device not in BY_DEVICE:
        raise TargetUnavailableError(
            f"no target for tensors on {device!r}. Devices with one: {', '.join(BY_DEVICE)}; or name a target."
        )
    return BY_DEVICE[device]
