"""Fused operations past torch's dispatcher, for code that Inductor wrote for the CPU and for our own.

`direct.int8_gemm(...)` means `torch.ops.gcu.int8_gemm.default(...)` and takes its arguments. The dispatcher and the
call of Python from it take longer than a small product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gcu_compile.kernels import registry


def __getattr__(name: str) -> Callable:
    if name not in registry.OPS or not registry.has_direct(registry.OPS[name]):
        raise AttributeError(f"no operation {name!r} with a short way")
    # What the short way does not take goes to the dispatcher, which knows of views that negate, modes and transforms.
    call = globals()[name] = registry.directly(registry.OPS[name], getattr(torch.ops.gcu, name).default)
    return call
