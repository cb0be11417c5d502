"""What Inductor wrote for the CPU and this process has loaded: kernels, and where its wrappers get memory from."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from types import ModuleType

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
NAMESPACES = {
    "torch": "torch",
    "aten": "torch.ops.aten",
    "inductor_ops": "torch.ops.inductor",
    "_quantized": "torch.ops._quantized",
    "extern_kernels": "extern_kernels",
}
COLLECTIVES = ("torch.ops._c10d_functional.", "torch.ops.c10d.")


def operation_at(path: str) -> str | None:
    """The operation at a path, or the beginning of its name; None: the path leads to no operation.

    >>> operation_at("torch.ops.aten.mm"), operation_at("torch.ops.aten"), operation_at("torch.float32")
    ('aten::mm', 'aten::', None)
    """
    if path.startswith("extern_kernels."):
        return path
    words = path.split(".")
    if words[:2] != ["torch", "ops"]:
        return None
    return "::".join([*words[2:3], words[3] if len(words) > 3 else ""])


class SeenOperations:
    """As a context: sees which operations torch's dispatcher runs in this thread.

    From outside, without a mode: operations take the way that they take without. The profiler of old does it, for
    today's writes to the log of every process that starts it.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._sees = False

    def __enter__(self) -> SeenOperations:
        self._start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> list[str]:
        """The names of the operations, each once; none is seen from now on."""
        if self._sees:
            self._sees = False
            names = (event.name() for events in _disable_profiler_legacy() for event in events)
            self._names |= dict.fromkeys(name for name in names if "::" in name)
        return list(self._names)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Operations within are not seen."""
        self.stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        off = (False,) * 5
        _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, *off, torch._C._profiler._ExperimentalConfig()))
        self._sees = True
