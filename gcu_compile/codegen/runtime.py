"""What generated wrappers call at run time, whatever stands behind the device.

A kernel that is launched while another card is current hangs, so every wrapper guards its device.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from gcu_compile.codegen.device import current
from gcu_compile.errors import TargetUnavailableError


def _runtime() -> Any:
    runtime = current()
    if runtime is None or runtime.kind == "fake":
        raise TargetUnavailableError(
            "this code was compiled for a GCU and none is here. Run it on a machine with torch_gcu, or emulate a card "
            "(GCU_COMPILE_EMULATE=gcu300)."
        )
    return runtime


def get_raw_stream(index: int) -> int:
    """Handle of the current stream of device `index`."""
    runtime = _runtime()
    if runtime.kind == "card":
        return importlib.import_module("torch_gcu._C")._gcu_getCurrentRawStream(index)
    return 0


def set_device(index: int) -> None:
    """Make device `index` current."""
    _runtime().module.set_device(index)


def device_guard(index: int) -> contextlib.AbstractContextManager:
    """Device `index` is current inside."""
    return _runtime().module.device(index)


def synchronize() -> None:
    """Wait for the current device."""
    _runtime().module.synchronize()
