"""Calls `attention.cpp`, for dense tensors and for a paged cache."""

from __future__ import annotations

import torch

from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.fields import Fields

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.bool: 4}
# `struct Arguments` of attention/arguments.h, field by field.
FIELDS = Fields(
    "q out q_outer q_head q_token out_outer out_head out_token tokens sequences "
    "block_table query_start_loc seq_lens table_stride table_blocks causal threads",
    "k v k_outer k_head k_token v_outer v_head v_token heads kv_heads head_dim v_dim block_size num_blocks "
    "q_len kv_len offset k_scale v_scale k_zero v_zero k_scale_kind v_scale_kind "
    "k_scale_outer k_scale_head k_scale_token v_scale_outer v_scale_head v_scale_token "
    "bias bias_dtype bias_batch bias_head bias_query bias_key alibi_slopes sinks scale soft_cap window "
    "dtype cache_dtype quantised quantised_scale",
    doubles=("scale", "soft_cap"),
    addresses="q out block_table query_start_loc seq_lens k v k_scale v_scale k_zero v_zero bias alibi_slopes sinks "
    "quantised quantised_scale",
)


def unavailable() -> str | None:
    """Why the library cannot be had, or None."""
    return build.refusal("attention")


def pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def floats(x: torch.Tensor | None) -> torch.Tensor | None:
    """float32 and contiguous; the caller keeps it alive until the call is over."""
    return None if x is None else x.to(torch.float32).contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with the values of a head adjacent, copied if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _common(dtype, k, v, heads, window, soft_cap, scale, alibi_slopes, sinks) -> dict:
    """What dense and paged calls share: `k` and `v` [batch or blocks, kv_heads, tokens, size]."""
    k_at, v_at = k.stride(), v.stride()
    return {
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "k_outer": k_at[0],
        "k_head": k_at[1],
        "k_token": k_at[2],
        "v_outer": v_at[0],
        "v_head": v_at[1],
        "v_token": v_at[2],
        "heads": heads,
        "kv_heads": k.shape[1],
        "head_dim": k.shape[3],
        "v_dim": v.shape[3],
        "alibi_slopes": pointer(alibi_slopes),
        "sinks": pointer(sinks),
        "scale": scale,
        "soft_cap": soft_cap,
        "window": window or 0,
        "dtype": DTYPES[dtype],
        "cache_dtype": DTYPES[k.dtype],
        "threads": torch.get_num_threads(),
    }


def refuses_dense(q, k, v, bias=None, *args, **kwargs) -> str | None:
    """Why the C++ kernel cannot take these arguments of `gcu::attention`, or None."""
    for name, x in (("q", q), ("bias", bias)):
        if x is not None and x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, not one of float32, bfloat16, float16"
    return unavailable()


def run_dense(q, k, v, bias=None, alibi_slopes=None, sinks=None, *, scale, causal=False, causal_offset=0, window=None,
              soft_cap=0.0) -> torch.Tensor:  # fmt: skip
    """`gcu::attention`; see `attention/dense.py`."""
    batch, heads, q_len, head_dim = q.shape
    q, k, v = map(_rows, (q, k, v))
    out = q.new_empty(batch, heads, q_len, v.shape[3])
    bias = None if bias is None else bias.expand(batch, heads, q_len, k.shape[2])
    alibi_slopes, sinks = floats(alibi_slopes), floats(sinks)
    fields = _common(q.dtype, k, v, heads, window, soft_cap, scale, alibi_slopes, sinks)
    fields["q"], fields["out"] = q.data_ptr(), out.data_ptr()
    fields["q_outer"], fields["q_head"], fields["q_token"], _ = q.stride()
    fields["out_outer"], fields["out_head"], fields["out_token"], _ = out.stride()
    fields["sequences"], fields["causal"], fields["offset"] = batch, causal, causal_offset
    fields["q_len"], fields["kv_len"] = q_len, k.shape[2]
    if bias is not None:
        fields["bias"], fields["bias_dtype"] = bias.data_ptr(), DTYPES[bias.dtype]
        fields |= zip(("bias_batch", "bias_head", "bias_query", "bias_key"), bias.stride(), strict=True)
    build.load("attention").gcu_attention(FIELDS.pack(fields))
    return out


def refuses_paged(q, k_cache, *args, **kwargs) -> str | None:
    """Why the C++ kernel cannot take these arguments of `gcu::paged_attention`, or None."""
    for name, x in (("q", q), ("k_cache", k_cache)):
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, which the C++ kernel does not read"
    return unavailable()


def _scale(fields: dict, name: str, scale, zero_point, held: list) -> None:
    """Fields of a cache's scale and zero point; `held` keeps converted tensors alive."""
    if scale is None:
        return
    kind = 3 if scale.dim() == 3 else 1 if scale.numel() == 1 else 2
    scale = scale.float()
    if kind == 2 or (zero_point is not None and zero_point.stride() != scale.stride()):
        scale, zero_point = scale.contiguous(), None if zero_point is None else zero_point.contiguous()
    held += [scale, zero_point]
    fields |= {f"{name}_scale": scale.data_ptr(), f"{name}_zero": pointer(zero_point), f"{name}_scale_kind": kind}
    if kind == 3:
        fields |= zip((f"{name}_scale_{part}" for part in ("outer", "head", "token")), scale.stride(), strict=True)


def paged_fields(dtype, heads, k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point, alibi_slopes, sinks,
                 scale, window, soft_cap) -> tuple[dict, list]:  # fmt: skip
    """Fields of a paged call that a layer keeps, for queries of `dtype`; tensors that must live as long as they."""
    alibi_slopes, sinks = floats(alibi_slopes), floats(sinks)
    held = [k_cache, v_cache, alibi_slopes, sinks]
    fields = _common(dtype, k_cache, v_cache, heads, window, soft_cap, scale, alibi_slopes, sinks)
    fields["num_blocks"], _, fields["block_size"], _ = k_cache.shape
    _scale(fields, "k", k_scale, k_zero_point, held)
    _scale(fields, "v", v_scale, v_zero_point, held)
    return fields, held


def run_paged(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, k_scale=None, v_scale=None,
              k_zero_point=None, v_zero_point=None, alibi_slopes=None, sinks=None, *, scale, causal=True, window=None,
              soft_cap=0.0, quantised=None) -> torch.Tensor | None:  # fmt: skip
    """`gcu::paged_attention`; see `attention/paged.py`. None: lengths or table entries are out of range.

    Args:
        quantised: int8 [tokens, heads, v_dim] and float32 [tokens, 1], written with the output quantised per token.
    """
    q, out = _rows(q), q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])
    query_start_loc, seq_lens = query_start_loc.contiguous(), seq_lens.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    fields, _held = paged_fields(q.dtype, q.shape[1], k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point,
                                 alibi_slopes, sinks, scale, window, soft_cap)  # fmt: skip
    fields["q"], fields["out"], fields["tokens"], fields["causal"] = q.data_ptr(), out.data_ptr(), q.shape[0], causal
    fields["q_token"], fields["q_head"], _ = q.stride()
    fields["out_token"], fields["out_head"], _ = out.stride()
    fields["sequences"] = seq_lens.shape[0]
    fields["query_start_loc"], fields["seq_lens"] = query_start_loc.data_ptr(), seq_lens.data_ptr()
    # An empty tensor has no address, and none means "dense".
    fields["block_table"] = block_table.data_ptr() or query_start_loc.data_ptr()
    fields["table_stride"], fields["table_blocks"] = block_table.stride(0), block_table.shape[1]
    if quantised is not None:
        fields["quantised"], fields["quantised_scale"] = (x.data_ptr() for x in quantised)
    return None if build.load("attention").gcu_attention(FIELDS.pack(fields)) else out
