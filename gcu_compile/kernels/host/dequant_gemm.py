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
    """`gcu::dequant_gemm`; see `dequant_gemm/eager.py`."""
    once(check.dequant_gemm, (x, weight, scales, zeros, g_idx, bias), layout=layout)
    groups, n = scales.shape
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty(rows.shape[0], n, dtype=x.dtype)
    # Converted tensors must live until the call is over.
    weight, zeros = prepack.native(weight, layout, n, k).contiguous(), prepack.zeros_of(zeros, layout)
    scales, zeros, bias = whole(scales, (groups, n)), whole(zeros, (groups, n)), whole(bias, (n,))
    g_idx = None if g_idx is None else check.group_indices(g_idx.to(torch.int32).contiguous(), groups)
    if rows.shape[0]:
        _call(rows, weight, scales, zeros, g_idx, bias, y, bits=layouts.get(layout).bits)
    return y.view(*x.shape[:-1], n)


def _call(x, weight, scales, zeros, g_idx, bias, y, bits: int) -> None:
    tensors = (x, weight, scales, zeros, g_idx, bias, y)
    fields = FIELDS.pack(
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(x.shape[0], x.shape[1], y.shape[1], scales.shape[0], x.stride(0)),
        *(NONE if tensor is None else DTYPES[tensor.dtype] for tensor in (x, scales, zeros, bias)),
        bits,
        torch.get_num_threads(),
    )
    build.load("dequant_gemm").gcu_dequant_gemm(fields)


def run_grouped(x, offsets, weight, scales, zeros=None, g_idx=None, bias=None, *, layout: str) -> torch.Tensor:
    """`gcu::dequant_gemm_grouped`: one product per expert that has rows."""
    arguments = (x, offsets, weight, scales, zeros, g_idx, bias)
    check.grouped(check.dequant_gemm, "dequant_gemm_grouped", *arguments, layout=layout)
    y = x.new_zeros(x.shape[0], scales.shape[-1])
    cuts = offsets.tolist()
    for expert, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        if last > first:
            one = [None if tensor is None else tensor[expert] for tensor in (weight, scales, zeros, g_idx, bias)]
            y[first:last] = run(x[first:last], *one, layout=layout)
    return y


def refuses_grouped(x, offsets, *args, layout: str) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if layout not in prepack.NATIVE.values():
        return f"experts in layout {layout}, not one of {', '.join(prepack.NATIVE.values())}"
    return refuses(x, *args, layout=layout)
