"""Calls `rope.cpp`."""

from __future__ import annotations

import torch

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
    "q q_out q_stride k k_stride v v_stride tokens positions slots threads q_norm k_norm",
    "heads kv_heads "
    + SIDE.format("k")
    + SIDE.format("v")
    + "cos_sin cos_sin_stride rows rotary block_size slot_count eps interleaved dtype cache_dtype cos_sin_dtype",
    doubles=("eps",),
    addresses="q q_out k v positions slots q_norm k_norm k_cache k_scale k_zero k_scale_cache v_cache v_scale v_zero "
    "v_scale_cache cos_sin",
)


def refuses(source: torch.Tensor, cache: torch.Tensor, cos_sin: torch.Tensor | None = None) -> str | None:
    """Why the C++ kernel cannot take these dtypes and sizes, or None."""
    for name, x in (("the input", source), ("the cache", cache), ("cos_sin", cos_sin)):
        if x is not None and x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, which the C++ kernel does not read"
    if cache.shape[3] > LARGEST_HEAD:
        return f"a head of {cache.shape[3]} is larger than {LARGEST_HEAD}"
    return build.refusal("rope")


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


def run_write(k, v, slot_mapping, k_cache, v_cache, *scales, **more_scales) -> bool:
    """`gcu::write_kv` of `k` and `v` [tokens, kv_heads * size], values of a token adjacent.

    Returns:
        Whether all slots are in range; nothing is written if not.
    """
    fields, _held = write_fields(k.dtype, k_cache, v_cache, *scales, **more_scales)
    slots = slot_mapping.contiguous()
    fields["k"], fields["k_stride"] = k.data_ptr(), k.stride(0)
    fields["v"], fields["v_stride"] = v.data_ptr(), v.stride(0)
    fields["tokens"], fields["slots"] = k.shape[0], slots.data_ptr()
    return build.load("rope").gcu_rope_and_cache(FIELDS.pack(fields)) == 0


def turn_fields(heads: int, cos_sin, interleaved: bool, eps: float) -> dict:
    """Fields of a rotation that a layer keeps, beside `write_fields`; the caller keeps `cos_sin` alive."""
    rows, rotary = cos_sin.shape
    return {
        "heads": heads,
        "cos_sin": cos_sin.data_ptr(),
        "cos_sin_stride": cos_sin.stride(0),
        "rows": rows,
        "rotary": rotary,
        "eps": eps,
        "interleaved": interleaved,
        "cos_sin_dtype": DTYPES[cos_sin.dtype],
    }


class Prepared:
    """The layer's fields of `gcu::rope_and_cache`, which follow from where and how its tensors lie.

    Args:
        dtype, heads: of the queries.
        others: as for `gcu::rope_and_cache`.
    """

    def __init__(self, dtype, heads, cos_sin, k_cache, v_cache, *scales, interleaved=False, eps=1e-6):
        fields, held = write_fields(dtype, k_cache, v_cache, *scales)
        fields |= turn_fields(heads, cos_sin, interleaved, eps)
        self.rows = cos_sin.shape[0]
        self.packed, self.heads, self.head_dim = FIELDS.pack_layer(fields), heads, k_cache.shape[3]
        self.k_at = heads * self.head_dim * dtype.itemsize
        self.v_at = self.k_at + fields["kv_heads"] * self.head_dim * dtype.itemsize
        # Scales that had to be converted live here, and their values may change: not to be used for another call.
        self.converted = [x for x, given in zip(held, (k_cache, v_cache, *scales), strict=False) if x is not given]


def run(prepared: Prepared, qkv, positions, slot_mapping, q_norm, k_norm) -> torch.Tensor | None:
    """`gcu::rope_and_cache`; see `attention/rope.py`. None: a slot or position is out of range, nothing is written."""
    tokens, (stride, inner) = qkv.shape[0], qkv.stride()
    if inner != 1:
        qkv = qkv.contiguous()
        stride = qkv.stride(0)
    out = qkv.new_empty((tokens, prepared.heads, prepared.head_dim))
    slots, positions = slot_mapping.contiguous(), None if positions is None else positions.contiguous()
    q_norm, k_norm = floats(q_norm), floats(k_norm)
    q = qkv.data_ptr()
    step = FIELDS.pack_step(
        q, out.data_ptr(), stride, q + prepared.k_at, stride, q + prepared.v_at, stride, tokens, pointer(positions),
        slots.data_ptr(), torch.get_num_threads(), pointer(q_norm), pointer(k_norm),
    )  # fmt: skip
    return None if build.load("rope").gcu_rope_and_cache(step + prepared.packed) else out
