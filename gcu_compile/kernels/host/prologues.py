"""Calls `prologues.cpp`: norm or activation, and quantisation per token, in one pass."""

from __future__ import annotations

import ctypes

import torch

from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.dtypes import FLOATS


class Arguments(ctypes.Structure):
    """`struct Arguments` of prologues.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "other", "weight", "codes", "scales", "residual_out")),
        *((name, ctypes.c_int64) for name in ("rows", "size", "x_stride", "other_stride")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "threads")),
    )


def refuses(x, other=None, weight=None, eps=0.0) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}"
    try:
        build.load("prologues")
    except KernelBuildError as error:
        return str(error)
    return None


def _rows(x: torch.Tensor, size: int) -> torch.Tensor:
    rows = x.reshape(-1, size)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _run(x, other, weight, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    leading, size = x.shape[:-1], x.shape[-1]
    x, other = _rows(x, size), None if other is None else _rows(other, size)
    codes = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32)
    total = None if other is None or weight is None else torch.empty(x.shape, dtype=x.dtype)
    weight = None if weight is None else weight.contiguous()
    # In the order of the fields, for keywords take longer than a small call runs.
    arguments = Arguments(
        x.data_ptr(),
        None if other is None else other.data_ptr(),
        None if weight is None else weight.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        None if total is None else total.data_ptr(),
        x.shape[0],
        size,
        x.stride(0),
        0 if other is None else other.stride(0),
        eps,
        FLOATS[x.dtype],
        0 if weight is None else FLOATS[weight.dtype],
        torch.get_num_threads(),
    )
    build.load("prologues").gcu_prologue(ctypes.byref(arguments))
    total = None if total is None else total.view(*leading, size)
    return codes.view(*leading, size), scales.view(*leading, 1), total


def rms_norm_quant(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gcu::rms_norm_quant`; see `prologues/eager.py`."""
    codes, scales, total = _run(x, residual, weight, eps)
    return codes, scales, x.new_empty(0) if total is None else total


def silu_mul_quant(x, up=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`gcu::silu_mul_quant`; see `prologues/eager.py`."""
    gate, up = x.chunk(2, -1) if up is None else (x, up)
    return _run(gate, up, None, 0.0)[:2]
