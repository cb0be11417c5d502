"""Calls `linear.cpp`."""

from __future__ import annotations

import struct

import torch

from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.dtypes import DTYPES, FLOATS, NONE

STRIP = 32  # as in linear.cpp and kernels/linear/eager.py
FIELDS = struct.Struct("4P4q2i")  # `struct Arguments` of linear.cpp, field by field


def is_fastest() -> bool:
    """Whether it is as fast as oneDNN or faster, as was measured on two cores for 1 to 8192 rows: with dot products of
    bfloat16 and without tiles."""
    return build.host_isa() == "avx512" and torch.cpu._is_avx512_bf16_supported()


def refuses(x: torch.Tensor, weight: torch.Tensor, n: int, bias: torch.Tensor | None = None) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not torch.bfloat16"
    if bias is not None and bias.dtype not in FLOATS:
        return f"bias is {bias.dtype}, not one of {', '.join(map(str, FLOATS))}"
    return build.refusal("linear")


def run(x: torch.Tensor, weight: torch.Tensor, n: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`gcu::linear`; see `linear/eager.py`."""
    rows = x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0) if x.dim() == 1 else x
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = _multiply(rows, weight.contiguous(), n, None if bias is None else bias.contiguous())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def direct(x: torch.Tensor, weight: torch.Tensor, n: int, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """`run` of what needs no look at more than this; None: there is more to look at."""
    if (
        x.dtype is not torch.bfloat16
        or weight.dtype is not torch.bfloat16
        or x.dim() != 2
        or x.stride(1) != 1
        or not (x.is_cpu and weight.is_cpu and weight.is_contiguous())
        or x.is_neg()
        or weight.is_neg()
        or n < 0
        or weight.shape != ((n + STRIP - 1) // STRIP, (x.shape[1] + 1) // 2, STRIP, 2)
    ):
        return None
    if bias is not None and (
        bias.dtype not in FLOATS or bias.shape != (n,) or not (bias.is_cpu and bias.is_contiguous()) or bias.is_neg()
    ):
        return None
    return _multiply(x, weight, n, bias)


def _multiply(x: torch.Tensor, weight: torch.Tensor, n: int, bias: torch.Tensor | None) -> torch.Tensor:
    m, k = x.shape
    y = torch.empty((m, n), dtype=torch.bfloat16)
    pointers = (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
    numbers = (m, k, n, x.stride(0), NONE if bias is None else DTYPES[bias.dtype], torch.get_num_threads())
    build.load("linear").gcu_linear(FIELDS.pack(*pointers, *numbers))
    return y
