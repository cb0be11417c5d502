"""Fused operations on the CPU for code that Inductor wrote, past torch's dispatcher.

`direct.int8_gemm(...)` means `torch.ops.gcu.int8_gemm.default(...)` and takes its arguments. The dispatcher and the
call of Python from it take longer than a small product; generated code has real tensors of a device that is known, on
which nothing else waits to see the call.
"""

from __future__ import annotations

from collections.abc import Callable

from gcu_compile.kernels import registry


def __getattr__(name: str) -> Callable:
    if name not in registry.OPS or not registry.has_direct(registry.OPS[name]):
        raise AttributeError(f"no operation {name!r} with a short way")
    call = globals()[name] = registry.directly(registry.OPS[name])
    return call
