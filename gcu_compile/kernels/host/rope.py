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


def run(qkv, heads, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm=None, k_norm=None, *scales,
        interleaved=False, eps=1e-6, **more_scales) -> torch.Tensor | None:  # fmt: skip
    """`gcu::rope_and_cache`; see `attention/rope.py`. None: a slot or position is out of range, nothing is written."""
    fields, _held = write_fields(qkv.dtype, k_cache, v_cache, *scales, **more_scales)
    tokens, head_dim, stride = qkv.shape[0], fields["k_size"], qkv.stride()
    if stride[1] != 1:
        qkv = qkv.contiguous()
        stride = qkv.stride()
    out = qkv.new_empty(tokens, heads, head_dim)
    slots, cos_sin = slot_mapping.contiguous(), cos_sin if cos_sin.stride(1) == 1 else cos_sin.contiguous()
    positions = None if positions is None else positions.contiguous()
    q_norm, k_norm = floats(q_norm), floats(k_norm)
    rows, rotary = cos_sin.shape
    address, value = qkv.data_ptr(), qkv.element_size()
    k_address = address + heads * head_dim * value
    fields |= {
        "q": address,
        "q_out": out.data_ptr(),
        "q_stride": stride[0],
        "k": k_address,
        "k_stride": stride[0],
        "v": k_address + fields["kv_heads"] * head_dim * value,
        "v_stride": stride[0],
        "tokens": tokens,
        "positions": pointer(positions),
        "slots": slots.data_ptr(),
        "heads": heads,
        "cos_sin": cos_sin.data_ptr(),
        "cos_sin_stride": cos_sin.stride(0),
        "rows": rows,
        "rotary": rotary,
        "q_norm": pointer(q_norm),
        "k_norm": pointer(k_norm),
        "eps": eps,
        "interleaved": interleaved,
        "cos_sin_dtype": DTYPES[cos_sin.dtype],
    }
    return out if build.load("rope").gcu_rope_and_cache(FIELDS.pack(fields)) == 0 else None
