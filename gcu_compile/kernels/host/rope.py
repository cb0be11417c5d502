"""Calls `rope.cpp`."""

from __future__ import annotations

import ctypes

import torch

from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.attention import DTYPES, I32, I64, P

LARGEST_HEAD = 1024


class Strides(ctypes.Structure):
    """`struct Strides` of rope.cpp."""

    _fields_ = (("block", I64), ("head", I64), ("slot", I64))


class Side(ctypes.Structure):
    """`struct Side` of rope.cpp: one of k and v, its source and its cache."""

    _fields_ = (
        ("source", P),
        ("source_stride", I64),
        ("size", I64),
        ("cache", P),
        ("at", Strides),
        ("scale", P),
        ("zero", P),
        ("scales", I64),
        ("scale_cache", P),
        ("scale_at", Strides),
    )


class Arguments(ctypes.Structure):
    """`struct Arguments` of rope.cpp, field by field."""

    _fields_ = (
        ("q", P),
        ("q_out", P),
        *((name, I64) for name in ("q_stride", "tokens", "heads", "kv_heads")),
        ("k", Side),
        ("v", Side),
        ("cos_sin", P),
        *((name, I64) for name in ("cos_sin_stride", "rows", "rotary")),
        *((name, P) for name in ("positions", "slots")),
        *((name, I64) for name in ("block_size", "slot_count")),
        *((name, P) for name in ("q_norm", "k_norm")),
        ("eps", ctypes.c_double),
        *((name, I32) for name in ("interleaved", "dtype", "cache_dtype", "cos_sin_dtype", "threads")),
    )


def refuses(source: torch.Tensor, cache: torch.Tensor, cos_sin: torch.Tensor | None = None) -> str | None:
    """Why the C++ kernel cannot take these dtypes and sizes, or None."""
    for name, x in (("the input", source), ("the cache", cache), ("cos_sin", cos_sin)):
        if x is not None and x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, which the C++ kernel does not read"
    if cache.shape[3] > LARGEST_HEAD:
        return f"a head of {cache.shape[3]} is larger than {LARGEST_HEAD}"
    try:
        build.load("rope")
    except KernelBuildError as error:
        return str(error)
    return None


def _side(x, cache, scale, zero_point, scale_cache) -> Side:
    side = Side(x.data_ptr(), x.stride(0), cache.shape[3], cache.data_ptr(), Strides(*cache.stride()[:3]))
    if scale_cache is not None:
        side.scale_cache, side.scale_at = scale_cache.data_ptr(), Strides(*scale_cache.stride())
    elif scale is not None:
        side.scale, side.scales = scale.data_ptr(), scale.numel()
        side.zero = None if zero_point is None else zero_point.data_ptr()
    return side


def run(q, k, v, slot_mapping, k_cache, v_cache, k_scale=None, v_scale=None, k_zero_point=None, v_zero_point=None,
        k_scale_cache=None, v_scale_cache=None, *, cos_sin=None, positions=None, q_norm=None, k_norm=None,
        interleaved=False, eps=1e-6) -> tuple[bool, torch.Tensor | None]:  # fmt: skip
    """Norm, rotation and write of separate q, k and v.

    Args:
        q: [tokens, heads * head_dim], values of a token adjacent; None: nothing but the write.
        k, v: [tokens, kv_heads * size], values of a token adjacent.
        the rest: as for `gcu::rope_and_cache`.

    Returns:
        Whether all slots and positions are in range (nothing is written if not); q as [tokens, heads, head_dim].
    """
    tokens, head_dim = k.shape[0], k_cache.shape[3]
    scales = [None if x is None else x.float().contiguous() for x in (k_scale, v_scale, q_norm, k_norm)]
    slots, positions = slot_mapping.contiguous(), None if positions is None else positions.contiguous()
    if cos_sin is not None and cos_sin.stride(1) != 1:
        cos_sin = cos_sin.contiguous()
    heads = 0 if q is None else q.shape[1] // head_dim
    out = None if q is None else q.new_empty(tokens, heads, head_dim)
    arguments = Arguments(
        q=None if q is None else q.data_ptr(),
        q_out=None if q is None else out.data_ptr(),
        q_stride=0 if q is None else q.stride(0),
        tokens=tokens,
        heads=heads,
        kv_heads=k_cache.shape[1],
        k=_side(k, k_cache, scales[0], k_zero_point, k_scale_cache),
        v=_side(v, v_cache, scales[1], v_zero_point, v_scale_cache),
        slots=slots.data_ptr(),
        block_size=k_cache.shape[2],
        slot_count=k_cache.shape[0] * k_cache.shape[2],
        q_norm=None if q_norm is None else scales[2].data_ptr(),
        k_norm=None if k_norm is None else scales[3].data_ptr(),
        eps=eps,
        interleaved=interleaved,
        dtype=DTYPES[k.dtype],
        cache_dtype=DTYPES[k_cache.dtype],
        threads=torch.get_num_threads(),
    )
    if cos_sin is not None:
        arguments.cos_sin, arguments.cos_sin_stride = cos_sin.data_ptr(), cos_sin.stride(0)
        arguments.rows, arguments.rotary = cos_sin.shape
        arguments.cos_sin_dtype = DTYPES[cos_sin.dtype]
        arguments.positions = None if positions is None else positions.data_ptr()
    return build.load("rope").gcu_rope_and_cache(ctypes.byref(arguments)) == 0, out
