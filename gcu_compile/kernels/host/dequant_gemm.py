"""Calls `dequant_gemm.cpp`."""

from __future__ import annotations

import struct

import torch

from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels.dequant_gemm import check, layouts
from gcu_compile.kernels.host import build, prepack
from gcu_compile.kernels.host.dtypes import DTYPES, FLOATS, NONE

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
    try:
        build.load("dequant_gemm")
    except KernelBuildError as error:
        return str(error)
    return None


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


def run(x, weight, scales, zeros=None, g_idx=None, bias=None, *, layout: str) -> torch.Tensor:
    """`gcu::dequant_gemm`; see `dequant_gemm/eager.py`.

    Between two products of a model the weights of the first have swept this code out of the caches: what is not asked
    for is not touched, for at one row that takes as long as the product.
    """
    once(check.dequant_gemm, (x, weight, scales, zeros, g_idx, bias), layout=layout)
    groups, n = scales.shape
    k = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty(rows.shape[0], n, dtype=x.dtype)
    # Converted tensors must live until the call is over.
    if layout not in prepack.NATIVE.values():
        weight, zeros = prepack.native(weight, layout, n, k), prepack.zeros_of(zeros, layout)
    weight, scales = weight.contiguous(), whole(scales, (groups, n))
    if zeros is not None:
        zeros = whole(zeros, (groups, n))
    if bias is not None:
        bias = whole(bias, (n,))
    if g_idx is not None:
        g_idx = check.group_indices(g_idx.to(torch.int32).contiguous(), groups)
    if rows.shape[0]:
        fields = _fields(rows, weight, scales, zeros, g_idx, bias, y, layouts.get(layout).bits)
        build.load("dequant_gemm").gcu_dequant_gemm(FIELDS.pack(*fields))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


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
    experts, groups, n = scales.shape
    x, offsets = x if x.stride(-1) == 1 else x.contiguous(), offsets.to(torch.int64).contiguous()
    y = between(offsets, torch.empty(x.shape[0], n, dtype=x.dtype))
    # Converted tensors must live until the call is over.
    weight, zeros = weight.contiguous(), whole(zeros, (experts, groups, n))
    scales, bias = whole(scales, (experts, groups, n)), whole(bias, (experts, n))
    g_idx = None if g_idx is None else check.group_indices(g_idx.to(torch.int32).contiguous(), groups)
    fields = _fields(x, weight, scales, zeros, g_idx, bias, y, layouts.get(layout).bits)
    build.load("dequant_gemm").gcu_dequant_gemm_grouped(GROUPED.pack(*fields, offsets.data_ptr(), experts))
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
