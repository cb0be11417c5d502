"""Calls `int8_gemm.cpp`: the integer product, and the quantisation of activations."""

from __future__ import annotations

import ctypes
import struct

import torch

from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels.dequant_gemm import check
from gcu_compile.kernels.host import build, prepack
from gcu_compile.kernels.host.dequant_gemm import between, once, whole
from gcu_compile.kernels.host.dtypes import DTYPES, FLOATS, NONE

# Largest K whose sum of products fits in 32 bits: 255 * 128 each, and 255 * 255 where both sides have zeros.
MOST_INPUTS = (2**31 - 1) // (255 * 128)
MOST_INPUTS_WITH_ZEROS = (2**31 - 1) // (255 * 255)


# `struct Arguments` of int8_gemm.cpp, field by field: pointers, sizes, dtypes.
FIELDS = struct.Struct("8P4q4i")
# `struct Grouped` of gemm/jobs.h: those, the offsets, the number of experts.
GROUPED = struct.Struct("8P4q4iPq")


class Quantize(ctypes.Structure):
    """`struct Quantize` of int8_gemm.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "k", "group", "x_stride")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "symmetric", "threads")),
    )


def _missing() -> str | None:
    try:
        build.load("int8_gemm")
    except KernelBuildError as error:
        return str(error)
    return None


def refuses(
    x, weight, scales, x_scales=None, x_zeros=None, zeros=None, bias=None, *, layout: str, out_dtype=None
) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if reason := prepack.refuses(weight, layout):
        return reason
    if x.dtype != torch.int8 and x.dtype not in FLOATS:
        return f"x is {x.dtype}, not int8 or one of {', '.join(map(str, FLOATS))}"
    if out_dtype is not None and out_dtype not in FLOATS:
        return f"out_dtype is {out_dtype}, not one of {', '.join(map(str, FLOATS))}"
    most = MOST_INPUTS if zeros is None else MOST_INPUTS_WITH_ZEROS
    if x.shape[-1] > most:
        return f"a sum over {x.shape[-1]} inputs may not fit in 32 bits; {most} do"
    return _missing()


def _column(tensor: torch.Tensor | None, size: int, dtype: torch.dtype) -> torch.Tensor | None:
    """One contiguous value for each row (or output) of a tensor that may be one value for all."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    if flat.dtype != dtype:
        flat = flat.to(dtype)
    return flat.expand(size).contiguous() if flat.shape[0] != size else flat.contiguous()


def run(
    x, weight, scales, x_scales=None, x_zeros=None, zeros=None, bias=None, *, layout: str, out_dtype=None
) -> torch.Tensor:
    """`gcu::int8_gemm`; see `dequant_gemm/eager.py`."""
    once(check.int8_gemm, (x, weight, scales, x_scales, x_zeros, zeros, bias), layout=layout, out_dtype=out_dtype)
    n, k = scales.shape[-1], x.shape[-1]
    out_dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    m = rows.shape[0]
    y = torch.empty(m, n, dtype=out_dtype)
    if m == 0:
        return y.view(*x.shape[:-1], n)
    # Converted tensors must live until the call is over. What is not asked for is not touched: see dequant_gemm.run.
    if layout not in prepack.NATIVE.values():
        weight, zeros = prepack.native(weight, layout, n, k), prepack.zeros_of(zeros, layout)
    if bias is not None:
        bias = whole(bias, (n,))
    of_x = (rows, _column(x_scales, m, torch.float32), _column(x_zeros, m, torch.int32))
    of_weight = (weight.contiguous(), _column(scales, n, torch.float32), _column(zeros, n, torch.int32), bias)
    held = (*of_x, *of_weight, y)
    build.load("int8_gemm").gcu_int8_gemm(FIELDS.pack(*_fields(*held)))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _fields(x, x_scales, x_zeros, weight, scales, zeros, bias, y) -> tuple[int, ...]:
    tensors = (x, x_scales, x_zeros, weight, scales, zeros, bias, y)
    return (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(x.shape[0], x.shape[1], y.shape[1], x.stride(0)),
        *(DTYPES[x.dtype], DTYPES[y.dtype], NONE if bias is None else DTYPES[bias.dtype]),
        torch.get_num_threads(),
    )


def run_grouped(x, offsets, weight, scales, x_scales=None, bias=None, *, layout: str, out_dtype=None) -> torch.Tensor:
    """`gcu::int8_gemm_grouped`: the experts that have rows, in one team of threads."""
    check.int8_grouped(x, offsets, weight, scales, x_scales, bias, layout=layout, out_dtype=out_dtype)
    (experts, _, n), m = scales.shape, x.shape[0]
    out_dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    x, offsets = x if x.stride(-1) == 1 else x.contiguous(), offsets.to(torch.int64).contiguous()
    y = between(offsets, torch.empty(m, n, dtype=out_dtype))
    bias = whole(bias, (experts, n))
    # Converted tensors must live until the call is over.
    held = (
        x,
        _column(x_scales, m, torch.float32),
        None,
        weight.contiguous(),
        _column(scales, experts * n, torch.float32),
        None,
        bias,
        y,
    )
    fields = GROUPED.pack(*_fields(*held), offsets.data_ptr(), experts)
    build.load("int8_gemm").gcu_int8_gemm_grouped(fields)
    return y


def refuses_grouped(x, offsets, weight, scales, *args, layout: str, out_dtype=None) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if layout not in prepack.NATIVE.values():
        return f"experts in layout {layout}, not {prepack.NATIVE[8]}"
    return refuses(x, weight, scales, layout=layout, out_dtype=out_dtype)


def refuses_quantize(x, group_size: int = 0, symmetric: bool = True) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}, not one of {', '.join(map(str, FLOATS))}"
    return _missing()


def run_quantize(x, group_size: int = 0, symmetric: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gcu::quantize_per_token`; see `quantize` in `dequant_gemm/eager.py`."""
    check.quantize(x, group_size)
    k = x.shape[-1]
    size = group_size or k
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(rows.shape[0], k // size, dtype=torch.float32)
    zeros = torch.empty(rows.shape[0], k // size, dtype=torch.int32)
    arguments = Quantize(
        x=rows.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr(),
        rows=rows.shape[0],
        k=k,
        group=size,
        x_stride=rows.stride(0),
        x_dtype=DTYPES[x.dtype],
        symmetric=int(symmetric),
        threads=torch.get_num_threads(),
    )
    build.load("int8_gemm").gcu_quantize(ctypes.byref(arguments))
    leading = x.shape[:-1]
    return codes.view(x.shape), scales.view(*leading, -1), zeros.view(*leading, -1)
