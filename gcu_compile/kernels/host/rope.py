"""Calls `rope.cpp`."""

from __future__ import annotations

import torch

from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.attention import DTYPES, floats, pointer
from gcu_compile.kernels.host.fields import Fields

LARGEST_HEAD = 1024
SIDE = (
    "{0}_size {0}_cache {0}_block {0}_head {0}_slot {0}_scale {0}_zero {0}_scales {0}_scale_cache "
    "{0}_scale_block {0}_scale_head {0}_scale_slot "
)
# `struct Arguments` of rope.cpp, field by field.
FIELDS = Fields(
    "q q_out q_stride k k_stride v v_stride tokens positions slots threads",
    "heads kv_heads "
    + SIDE.format("k")
    + SIDE.format("v")
    + "cos_sin cos_sin_stride rows rotary block_size slot_count q_norm k_norm eps interleaved "
    "dtype cache_dtype cos_sin_dtype",
    doubles=("eps",),
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


def _side(name: str, cache, scale, zero_point, scale_cache) -> dict:
    block, head, slot, _ = cache.stride()
    fields = {
        f"{name}_size": cache.shape[3],
        f"{name}_cache": cache.data_ptr(),
        f"{name}_block": block,
        f"{name}_head": head,
        f"{name}_slot": slot,
    }
    if scale_cache is not None:
        fields[f"{name}_scale_cache"] = scale_cache.data_ptr()
        fields |= zip((f"{name}_scale_{part}" for part in ("block", "head", "slot")), scale_cache.stride(), strict=True)
    elif scale is not None:
        fields[f"{name}_scale"], fields[f"{name}_scales"] = scale.data_ptr(), scale.numel()
        fields[f"{name}_zero"] = pointer(zero_point)
    return fields


def write_fields(dtype, k_cache, v_cache, k_scale=None, v_scale=None, k_zero_point=None, v_zero_point=None,
                 k_scale_cache=None, v_scale_cache=None) -> tuple[dict, list]:  # fmt: skip
    """Fields of a write that a layer keeps, for keys of `dtype`; tensors that must live as long as they."""
    k_scale, v_scale = floats(k_scale), floats(v_scale)
    fields = _side("k", k_cache, k_scale, k_zero_point, k_scale_cache)
    fields |= _side("v", v_cache, v_scale, v_zero_point, v_scale_cache)
    blocks, fields["kv_heads"], fields["block_size"], _ = k_cache.shape
    fields["slot_count"] = blocks * fields["block_size"]
    fields["dtype"], fields["cache_dtype"] = DTYPES[dtype], DTYPES[k_cache.dtype]
    fields["threads"] = torch.get_num_threads()
    held = [k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point, k_scale_cache, v_scale_cache]
    return fields, held


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
    fields, _held = write_fields(
        k.dtype, k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point, k_scale_cache, v_scale_cache
    )
    slots, out = slot_mapping.contiguous(), None
    fields["k"], fields["k_stride"] = k.data_ptr(), k.stride(0)
    fields["v"], fields["v_stride"] = v.data_ptr(), v.stride(0)
    fields["tokens"], fields["slots"] = tokens, slots.data_ptr()
    if q is not None:
        heads = q.shape[1] // head_dim
        out = q.new_empty(tokens, heads, head_dim)
        fields["q"], fields["q_out"], fields["q_stride"] = q.data_ptr(), out.data_ptr(), q.stride(0)
        fields["heads"] = heads
    q_norm, k_norm = floats(q_norm), floats(k_norm)
    fields["q_norm"], fields["k_norm"] = pointer(q_norm), pointer(k_norm)
    fields["eps"], fields["interleaved"] = eps, interleaved
    if cos_sin is not None:
        cos_sin = cos_sin if cos_sin.stride(1) == 1 else cos_sin.contiguous()
        positions = None if positions is None else positions.contiguous()
        fields["cos_sin"], fields["cos_sin_stride"] = cos_sin.data_ptr(), cos_sin.stride(0)
        fields["rows"], fields["rotary"] = cos_sin.shape
        fields["cos_sin_dtype"], fields["positions"] = DTYPES[cos_sin.dtype], pointer(positions)
    return build.load("rope").gcu_rope_and_cache(FIELDS.pack(fields)) == 0, out
