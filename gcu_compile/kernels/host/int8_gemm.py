"""Calls `int8_gemm.cpp`: the integer product, and the quantisation of activations."""

from __future__ import annotations

import ctypes
import struct

import torch

from gcu_compile.kernels.dequant_gemm import check, integers
from gcu_compile.kernels.host import build, prepack
from gcu_compile.kernels.host.dequant_gemm import between, once, rows_of, whole
from gcu_compile.kernels.host.dtypes import DTYPES, FLOATS, NONE
from gcu_compile.kernels.host.known import Known, as_they_lie

# `struct Arguments` of int8_gemm.cpp, field by field: pointers, sizes, dtypes.
FIELDS = struct.Struct("8P4q6i")
# `struct Grouped` of gemm/jobs.h: those, the offsets, the number of experts.
GROUPED = struct.Struct("8P4q6iPq")
A_ROW, OF_ALL = 1, 0  # how x_scales and x_zeros go on from row to row


class Quantize(ctypes.Structure):
    """`struct Quantize` of int8_gemm.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "k", "group", "x_stride")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "symmetric", "threads")),
    )


def _missing() -> str | None:
    return build.refusal("int8_gemm")


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
    if reason := integers.fractional(x_zeros, zeros, look=True):
        return reason
    return integers.too_many(x.shape[-1], x_zeros is not None, zeros is not None) or _missing()


def _column(tensor: torch.Tensor | None, size: int, dtype: torch.dtype) -> torch.Tensor | None:
    """One contiguous value for each row (or output) of a tensor that may be one value for all."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    if flat.dtype != dtype:
        flat = flat.to(dtype)
    return flat.expand(size).contiguous() if flat.shape[0] != size else flat.contiguous()


class Layer:
    """The weight's side of a product of `k` inputs and `n` outputs: where the kernel reads it; it holds no tensor."""

    __slots__ = ("bias_dtype", "k", "layout", "n", "pointers")

    def __init__(self, layout: str, n: int, k: int, weight, scales, zeros, bias):
        self.layout, self.n, self.k = layout, n, k
        self.pointers = tuple(0 if x is None else x.data_ptr() for x in (weight, scales, zeros, bias))
        self.bias_dtype = NONE if bias is None else DTYPES[bias.dtype]

    def multiply(self, x, m, stride, x_scales, x_zeros, out_dtype) -> torch.Tensor:
        """[m, n] in `out_dtype` of x [m, k], rows `stride` apart.

        x is int8, codes of x_scales [m, 1] float32 (and x_zeros [m, 1] int32), contiguous; or floating point, which is
        quantised here: by those, or without them by a scale that each row gets.
        """
        y = torch.empty((m, self.n), dtype=out_dtype)
        if m:
            fields = FIELDS.pack(
                x.data_ptr(),
                0 if x_scales is None else x_scales.data_ptr(),
                0 if x_zeros is None else x_zeros.data_ptr(),
                *self.pointers,
                y.data_ptr(),
                m,
                self.k,
                self.n,
                stride,
                DTYPES[x.dtype],
                DTYPES[out_dtype],
                self.bias_dtype,
                torch.get_num_threads(),
                A_ROW,
                A_ROW,
            )
            build.load("int8_gemm").gcu_int8_gemm(fields)
        return y

    def multiply_grouped(self, x, offsets, experts: int, scales, dtype, zeros=None) -> torch.Tensor:
        """[rows, n] in `dtype` of x [rows, k], whose rows lie as far apart as its stride says: expert e takes the rows
        from offsets[e] to offsets[e + 1], other rows are not written. The layer is that of all experts.

        x is int8 with its scales (and zeros), or floating point as in `multiply`. Those of rows are [rows, 1], those
        of experts [experts, 1, 1]; contiguous float32 and int32.
        """
        y, (m, k) = torch.empty((x.shape[0], self.n), dtype=dtype), x.shape
        of_x = (0 if tensor is None else tensor.data_ptr() for tensor in (x, scales, zeros))
        steps = (OF_ALL if tensor is not None and tensor.dim() == 3 else A_ROW for tensor in (scales, zeros))
        numbers = (m, k, self.n, x.stride(0), DTYPES[x.dtype], DTYPES[dtype], self.bias_dtype, torch.get_num_threads())
        fields = GROUPED.pack(*of_x, *self.pointers, y.data_ptr(), *numbers, *steps, offsets.data_ptr(), experts)
        build.load("int8_gemm").gcu_int8_gemm_grouped(fields)
        return y


_layers = Known()
#: Layers of all experts, as `run_grouped` met them.
experts = Known()


def run(
    x, weight, scales, x_scales=None, x_zeros=None, zeros=None, bias=None, *, layout: str, out_dtype=None
) -> torch.Tensor:
    """`gcu::int8_gemm`; see `dequant_gemm/eager.py`."""
    once(check.int8_gemm, (x, weight, scales, x_scales, x_zeros, zeros, bias), layout=layout, out_dtype=out_dtype)
    n, k = scales.shape[-1], x.shape[-1]
    given = (weight, scales, zeros, bias)
    if layout not in prepack.NATIVE.values():
        weight, zeros = prepack.native(weight, layout, n, k), prepack.zeros_of(zeros, layout)
    scales, zeros = _column(scales, n, torch.float32), _column(zeros, n, torch.int32)
    read = (weight.contiguous(), scales, zeros, whole(bias, (n,)))  # they live until the product is there
    layer = Layer(layout, n, k, *read)
    # What is known serves activations with zeros too, without another look at the inputs' number.
    if as_they_lie(given, read) and not integers.too_many(k, True, zeros is not None):
        _layers.keep(layer, *given)
    rows, m, stride = rows_of(x, k)
    if out_dtype is None:
        out_dtype = x.dtype if x.is_floating_point() else torch.float32
    x_scales, x_zeros = _column(x_scales, m, torch.float32), _column(x_zeros, m, torch.int32)
    y = layer.multiply(rows, m, stride, x_scales, x_zeros, out_dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def direct(
    x, weight, scales, x_scales=None, x_zeros=None, zeros=None, bias=None, *, layout: str, out_dtype=None
) -> torch.Tensor | None:
    """`run` for a layer that it met before; None: it is another, or there is more to look at."""
    layer = _layers.find(weight, scales, zeros, bias)
    if layer is None or layer.layout != layout or x.dim() != 2:
        return None
    (m, k), (stride, inner), dtype = x.shape, x.stride(), x.dtype
    if k != layer.k or inner != 1 or not x.is_cpu or x.is_neg():
        return None
    if dtype is torch.int8:
        if x_scales is None:
            return None
        out_dtype = out_dtype or torch.float32
    elif dtype in FLOATS:
        out_dtype = out_dtype or dtype
    else:
        return None
    if out_dtype not in FLOATS:
        return None
    if x_scales is not None and not _is_column(x_scales, m, torch.float32):
        return None
    if x_zeros is not None and (x_scales is None or not _is_column(x_zeros, m, torch.int32)):
        return None
    return layer.multiply(x, m, stride, x_scales, x_zeros, out_dtype)


def _is_column(tensor: torch.Tensor, m: int, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.shape == (m, 1) and tensor.is_contiguous() and tensor.is_cpu


def run_grouped(
    x, offsets, weight, scales, x_scales=None, bias=None, *, layout: str, out_dtype=None, x_zeros=None, zeros=None
) -> torch.Tensor:
    """`gcu::int8_gemm_grouped`: the experts that have rows, in one team of threads."""
    of_x = {"x_scales": x_scales, "x_zeros": x_zeros}
    check.int8_grouped(x, offsets, weight, scales, bias=bias, zeros=zeros, layout=layout, out_dtype=out_dtype, **of_x)
    (count, _, n), given = scales.shape, (weight, scales, zeros, bias)
    out_dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    x, offsets = x if x.stride(-1) == 1 else x.contiguous(), offsets.to(torch.int64).contiguous()
    columns = _column(scales, count * n, torch.float32), _column(zeros, count * n, torch.int32)
    read = (weight.contiguous(), *columns, whole(bias, (count, n)))  # they live until the product is there
    layer = Layer(layout, n, x.shape[1], *read)
    if as_they_lie(given, read) and not integers.too_many(x.shape[1], True, zeros is not None):
        experts.keep(layer, *given)
    of_rows = _of_rows(x_scales, x.shape[0], count, torch.float32), _of_rows(x_zeros, x.shape[0], count, torch.int32)
    return between(offsets, layer.multiply_grouped(x, offsets, count, of_rows[0], out_dtype, of_rows[1]))


def _of_rows(tensor: torch.Tensor | None, rows: int, count: int, dtype: torch.dtype) -> torch.Tensor | None:
    """[rows, 1] of what belongs to rows, or [count, 1, 1] of what belongs to experts, as the kernel reads it."""
    if tensor is not None and tensor.dim() == 3:
        return _column(tensor, count, dtype).view(count, 1, 1)
    return _column(tensor, rows, dtype)


def refuses_grouped(
    x, offsets, weight, scales, x_scales=None, bias=None, *, layout: str, out_dtype=None, x_zeros=None, zeros=None
) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if layout not in prepack.NATIVE.values():
        return f"experts in layout {layout}, not {prepack.NATIVE[8]}"
    return refuses(x, weight, scales, x_zeros=x_zeros, zeros=zeros, layout=layout, out_dtype=out_dtype)


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
