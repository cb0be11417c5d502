"""Calls `prologues.cpp`: norm or activation, and quantisation per token, in one pass."""

from __future__ import annotations

import struct

import torch

from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.dtypes import FLOATS

# `struct Arguments` of prologues.cpp, field by field: pointers, sizes, epsilon, dtypes.
FIELDS = struct.Struct("6P4qd3i")


def refuses(x, other=None, weight=None, eps=0.0) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}"
    return build.refusal("prologues")


def _rows(x: torch.Tensor, size: int) -> torch.Tensor:
    rows = x.reshape(-1, size)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _run(x, other, other_at, weight, eps, rows, size, stride, other_stride):
    """Codes and scales of `rows` of `size` values; s too where there are a norm and a residual.

    Rows of x are `stride` elements apart; those of `other` begin at the address `other_at` (0: there is none).
    """
    codes = torch.empty((rows, size), dtype=torch.int8)
    scales = torch.empty((rows, 1), dtype=torch.float32)
    total = None if weight is None or other is None else torch.empty((rows, size), dtype=x.dtype)
    fields = FIELDS.pack(
        x.data_ptr(),
        other_at,
        0 if weight is None else weight.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        0 if total is None else total.data_ptr(),
        rows,
        size,
        stride,
        other_stride,
        eps,
        FLOATS[x.dtype],
        0 if weight is None else FLOATS[weight.dtype],
        torch.get_num_threads(),
    )
    build.load("prologues").gcu_prologue(fields)
    return codes, scales, total


def _pair(x, other, weight, eps):
    """`_run` for rows with any leading dimensions."""
    leading, size = x.shape[:-1], x.shape[-1]
    x, other = _rows(x, size), None if other is None else _rows(other, size)
    at, apart = (0, 0) if other is None else (other.data_ptr(), other.stride(0))
    weight = None if weight is None else weight.contiguous()
    codes, scales, total = _run(x, other, at, weight, eps, x.shape[0], size, x.stride(0), apart)
    return codes.view(*leading, size), scales.view(*leading, 1), None if total is None else total.view(*leading, size)


def rms_norm_quant(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gcu::rms_norm_quant`; see `prologues/eager.py`."""
    codes, scales, total = _pair(x, residual, weight, eps)
    return codes, scales, x.new_empty(0) if total is None else total


def silu_mul_quant(x, up=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`gcu::silu_mul_quant`; see `prologues/eager.py`."""
    gate, up = x.chunk(2, -1) if up is None else (x, up)
    return _pair(gate, up, None, 0.0)[:2]


def _is_plain(x: torch.Tensor, dtype: torch.dtype) -> bool:
    plain = type(x) is torch.Tensor and x.is_cpu and not x.is_neg()
    return plain and x.dtype is dtype and x.dim() == 2 and x.stride(1) == 1


def direct_rms_norm_quant(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`rms_norm_quant` for matrices and floats that the kernel takes; None: there is more to look at."""
    dtype, shape = x.dtype, x.shape
    if dtype not in FLOATS or not _is_plain(x, dtype) or not shape[1]:
        return None
    if weight.dtype not in FLOATS or weight.shape != shape[1:]:
        return None
    if not weight.is_cpu or not weight.is_contiguous() or weight.is_neg():
        return None
    at = apart = 0
    if residual is not None:
        if not _is_plain(residual, dtype) or residual.shape != shape:
            return None
        at, apart = residual.data_ptr(), residual.stride(0)
    codes, scales, total = _run(x, residual, at, weight, eps, *shape, x.stride(0), apart)
    return codes, scales, torch.empty(0, dtype=dtype) if total is None else total


def direct_silu_mul_quant(x, up=None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`silu_mul_quant` for matrices and floats that the kernel takes; None: there is more to look at."""
    dtype, (rows, size) = x.dtype, x.shape if x.dim() == 2 else (0, 0)
    if dtype not in FLOATS or not size or not _is_plain(x, dtype):
        return None
    if up is None:
        if size % 2:
            return None
        size //= 2
        up, at, apart = x, x.data_ptr() + size * x.element_size(), x.stride(0)
    elif _is_plain(up, dtype) and up.shape == x.shape:
        at, apart = up.data_ptr(), up.stride(0)
    else:
        return None
    return _run(x, up, at, None, 0.0, rows, size, x.stride(0), apart)[:2]
