"""What Inductor wrote for the CPU and this process has loaded: kernels, and where its wrappers get memory from."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch._inductor.codecache import PyCodeCache
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy

ALLOCATE = "empty_strided_cpu"  # as its wrappers call it


def wrappers() -> list[ModuleType]:
    """Every wrapper's module, of compiled graphs and of those that were found in a cache."""
    return [module for module in PyCodeCache.modules if hasattr(module, ALLOCATE)]


def kernels(wrapper: ModuleType) -> Iterator[tuple[str, Callable]]:
    """Names and functions of the C++ kernels that a wrapper calls."""
    for name, value in list(vars(wrapper).items()):
        library = getattr(value, "__self__", None)
        if getattr(value, "__name__", "") == "kernel" and str(getattr(library, "__file__", "")).endswith(".so"):
            yield name, value


@functools.cache
def address(kernel: Callable) -> int:
    """Of the C function behind a kernel, which takes the tensors' addresses and the integers in the same order."""
    library = ctypes.CDLL(kernel.__self__.__file__)  # loaded already: the same
    return ctypes.cast(library.kernel, ctypes.c_void_p).value


# How wrappers reach operations of torch: name in the wrapper -> path.
OWNERS = {
    "torch": "torch",
    "aten": "torch.ops.aten",
    "inductor_ops": "torch.ops.inductor",
    "_quantized": "torch.ops._quantized",
    "extern_kernels": "extern_kernels",
}


def owners_of_operations(wrapper: ModuleType) -> Iterator[tuple[str, Any]]:
    """Names and values of what a wrapper finds operations in."""
    for name in OWNERS:
        if hasattr(wrapper, name):
            yield name, getattr(wrapper, name)


def operation(path: str) -> str | None:
    """What lies at a path: an operation's name, or the beginning of one; None: no part of an operation's name.

    >>> operation("torch.ops.aten.mm"), operation("torch.ops.aten"), operation("torch.float32")
    ('aten::mm', 'aten::', None)
    """
    if path.startswith("extern_kernels."):
        return path
    words = path.split(".")
    if words[:2] != ["torch", "ops"]:
        return None
    return "::".join([*words[2:3], words[3] if len(words) > 3 else ""])


class SeenOperations:
    """As a context: the names of the operations that torch's dispatcher ran in this thread, once each, in `names`.

    Seen from outside, without a mode: operations take the way that they take without. The profiler of old does it,
    for today's writes to the log of every process that starts it.
    """

    def __enter__(self) -> SeenOperations:
        self.names: dict[str, None] = {}
        self._start()
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Operations within are not seen."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        off = (False,) * 5
        _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, *off, torch._C._profiler._ExperimentalConfig()))

    def _stop(self) -> None:
        names = (event.name() for events in _disable_profiler_legacy() for event in events)
        self.names |= dict.fromkeys(name for name in names if "::" in name)
