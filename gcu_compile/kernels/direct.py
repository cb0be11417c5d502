"""Fused operations on the CPU for code that Inductor wrote, past torch's dispatcher.

`direct.int8_gemm(...)` means `torch.ops.gcu.int8_gemm.default(...)` and takes its arguments. The dispatcher and the
call of Python from it take longer than a small product, and generated code has real tensors of a device that is known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gcu_compile.kernels import registry


def __getattr__(name: str) -> Callable:
    if name not in registry.OPS or not registry.has_direct(registry.OPS[name]):
        raise AttributeError(f"no operation {name!r} with a short way")
    directly, dispatched = registry.directly(registry.OPS[name]), getattr(torch.ops.gcu, name).default

    def call(x, *args, **kwargs):
        # A view that negates (the imaginary part of a conjugate) is made real by the dispatcher alone.
        return dispatched(x, *args, **kwargs) if x.is_neg() else directly(x, *args, **kwargs)

    globals()[name] = call
    return call
