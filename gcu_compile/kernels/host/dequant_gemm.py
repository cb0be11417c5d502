"""Calls `dequant_gemm.cpp`."""

from __future__ import annotations

import struct

import torch

from gcu_compile.kernels.dequant_gemm import check, layouts
from gcu_compile.kernels.host import build, prepack
from gcu_compile.kernels.host.dtypes import DTYPES, FLOATS, NONE
from gcu_compile.kernels.host.known import Known, as_they_lie

# `struct Arguments` of dequant_gemm.cpp, field by field: pointers, sizes, dtypes. Packed, not built as a ctypes
# structure: that takes longer than a small product.
FIELDS = struct.Struct("7P5q6i")
# `struct Grouped` of gemm/jobs.h: those, the offsets, the number of experts.
GROUPED = struct.Struct("7P5q6iPq")
# Metadata of arguments that were checked: a layer asks the same at every call.
_checked: set[tuple] = set()
MOST_CHECKED = 4096


def refuses(x, weight, scales, zeros=None, g_idx=None, bias=None, *, layout: str) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if reason := prepack.refuses(weight, layout):
        return reason
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}, not one of {', '.join(map(str, FLOATS))}"
    for name, tensor in (("scales", scales), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} are {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}"
    return build.refusal("dequant_gemm")


def whole(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """`tensor` as a contiguous one of `shape` and a dtype that the kernel reads."""
    if tensor is None:
        return None
    tensor = tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)
    return tensor.expand(shape).contiguous() if tensor.shape != shape else tensor.contiguous()


def once(check_arguments, tensors: tuple[torch.Tensor | None, ...], **options) -> None:
    """`check_arguments(*tensors, **options)`, unless tensors of the same shapes and dtypes have passed it."""
    key = (check_arguments, *((t.shape, t.dtype) if t is not None else None for t in tensors), *options.items())
    if key in _checked:
        return
    check_arguments(*tensors, **options)
    if len(_checked) >= MOST_CHECKED:
        _checked.clear()
    _checked.add(key)


class Layer:
    """The weight's side of a product of `k` inputs and `n` outputs: where the kernel reads it; it holds no tensor."""

    __slots__ = ("groups", "k", "layout", "n", "numbers", "pointers")

    def __init__(self, layout: str, k: int, weight, scales, zeros, bias, g_idx):
        self.groups, self.n = scales.shape[-2:]
        self.layout, self.k = layout, k
        self.pointers = tuple(0 if x is None else x.data_ptr() for x in (weight, scales, zeros, g_idx, bias))
        dtypes = (NONE if x is None else DTYPES[x.dtype] for x in (scales, zeros, bias))
        self.numbers = (*dtypes, layouts.get(layout).bits)

    def multiply(self, x: torch.Tensor, m: int, stride: int) -> torch.Tensor:
        """[m, n] of x [m, k], rows `stride` apart; float32, bfloat16 or float16, as the result."""
        y = torch.empty((m, self.n), dtype=x.dtype)
        if m:
            sizes = (m, self.k, self.n, self.groups, stride)
            numbers = (DTYPES[x.dtype], *self.numbers, torch.get_num_threads())
            fields = FIELDS.pack(x.data_ptr(), *self.pointers, y.data_ptr(), *sizes, *numbers)
            build.load("dequant_gemm").gcu_dequant_gemm(fields)
        return y

    def multiply_grouped(self, x, offsets, experts: int, scales=None, dtype=None, zeros=None) -> torch.Tensor:
        """[rows, n] of contiguous x [rows, k]: expert e takes the rows from offsets[e] to offsets[e + 1], and every row
        has one. The layer is that of all experts.

        Args:
            scales, dtype, zeros: of integers, which these are not.
        """
        y = torch.empty((x.shape[0], self.n), dtype=x.dtype)
        sizes = (x.shape[0], self.k, self.n, self.groups, self.k)
        numbers = (DTYPES[x.dtype], *self.numbers, torch.get_num_threads())
        fields = (x.data_ptr(), *self.pointers, y.data_ptr(), *sizes, *numbers, offsets.data_ptr(), experts)
        build.load("dequant_gemm").gcu_dequant_gemm_grouped(GROUPED.pack(*fields))
        return y


_layers = Known()
#: Layers of all experts, as `run_grouped` met them.
experts = Known()


def rows_of(x: torch.Tensor, k: int) -> tuple[torch.Tensor, int, int]:
    """(x as rows of `k` neighbouring values, how many, how far from each other)"""
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    stride, inner = rows.stride()
    if inner != 1:
        rows, stride = rows.contiguous(), k
    return rows, rows.shape[0], stride


def run(x, weight, scales, zeros=None, g_idx=None, bias=None, *, layout: str) -> torch.Tensor:
    """`gcu::dequant_gemm`; see `dequant_gemm/eager.py`."""
    once(check.dequant_gemm, (x, weight, scales, zeros, g_idx, bias), layout=layout)
    groups, n = scales.shape
    k, given = x.shape[-1], (weight, scales, zeros, bias)
    if layout not in prepack.NATIVE.values():
        weight, zeros = prepack.native(weight, layout, n, k), prepack.zeros_of(zeros, layout)
    if g_idx is not None:
        g_idx = check.group_indices(g_idx.to(torch.int32).contiguous(), groups)
    scales, zeros = whole(scales, (groups, n)), whole(zeros, (groups, n))
    read = (weight.contiguous(), scales, zeros, whole(bias, (n,)))  # they live until the product is there
    layer = Layer(layout, k, *read, g_idx)
    if g_idx is None and as_they_lie(given, read):  # the values of a g_idx are checked each time
        _layers.keep(layer, *given)
    y = layer.multiply(*rows_of(x, k))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def direct(x, weight, scales, zeros=None, g_idx=None, bias=None, *, layout: str) -> torch.Tensor | None:
    """`run` for a layer that it met before; None: it is another, or there is more to look at."""
    layer = None if g_idx is not None else _layers.find(weight, scales, zeros, bias)
    if layer is None or layer.layout != layout or x.dim() != 2:
        return None
    (m, k), (stride, inner) = x.shape, x.stride()
    if k != layer.k or inner != 1 or x.dtype not in FLOATS or not x.is_cpu or x.is_neg():
        return None
    return layer.multiply(x, m, stride)


def _fields(x, weight, scales, zeros, g_idx, bias, y, bits: int) -> tuple[int, ...]:
    tensors = (x, weight, scales, zeros, g_idx, bias, y)
    return (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(x.shape[0], x.shape[1], y.shape[1], scales.shape[-2], x.stride(0)),
        *(NONE if tensor is None else DTYPES[tensor.dtype] for tensor in (x, scales, zeros, bias)),
        bits,
        torch.get_num_threads(),
    )


def run_grouped(x, offsets, weight, scales, zeros=None, g_idx=None, bias=None, *, layout: str) -> torch.Tensor:
    """`gcu::dequant_gemm_grouped`: the experts that have rows, in one team of threads."""
    arguments = (x, offsets, weight, scales, zeros, g_idx, bias)
    check.grouped(check.dequant_gemm, "dequant_gemm_grouped", *arguments, layout=layout)
    (count, groups, n), given = scales.shape, (weight, scales, zeros, bias)
    x, offsets = x if x.stride(-1) == 1 else x.contiguous(), offsets.to(torch.int64).contiguous()
    y = between(offsets, torch.empty(x.shape[0], n, dtype=x.dtype))
    # Converted tensors must live until the call is over.
    weight, zeros = weight.contiguous(), whole(zeros, (count, groups, n))
    scales, bias = whole(scales, (count, groups, n)), whole(bias, (count, n))
    g_idx = None if g_idx is None else check.group_indices(g_idx.to(torch.int32).contiguous(), groups)
    fields = _fields(x, weight, scales, zeros, g_idx, bias, y, layouts.get(layout).bits)
    build.load("dequant_gemm").gcu_dequant_gemm_grouped(GROUPED.pack(*fields, offsets.data_ptr(), count))
    read = (weight, scales, zeros, bias)
    if g_idx is None and as_they_lie(given, read):
        experts.keep(Layer(layout, x.shape[1], *read, None), *given)
    return y


def between(offsets: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`y` with zeros in the rows outside all experts."""
    y[: int(offsets[0])] = 0
    y[int(offsets[-1]) :] = 0
    return y


def refuses_grouped(x, offsets, *args, layout: str) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if layout not in prepack.NATIVE.values():
        return f"experts in layout {layout}, not one of {', '.join(prepack.NATIVE.values())}"
    return refuses(x, *args, layout=layout)
