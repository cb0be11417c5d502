"""Calls `attention.cpp`, for dense tensors and for a paged cache."""

from __future__ import annotations

import ctypes

import torch

from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels.host import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.bool: 4}
P, I64, I32, F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double


class Strides(ctypes.Structure):
    """`struct Strides` of attention/arguments.h."""

    _fields_ = (("outer", I64), ("head", I64), ("token", I64))


class Arguments(ctypes.Structure):
    """`struct Arguments` of attention/arguments.h, field by field."""

    _fields_ = (
        *((name, P) for name in ("q", "k", "v", "out")),
        *((name, Strides) for name in ("q_at", "k_at", "v_at", "out_at")),
        *((name, I64) for name in ("sequences", "heads", "kv_heads", "head_dim", "v_dim", "tokens")),
        *((name, P) for name in ("block_table", "query_start_loc", "seq_lens")),
        *((name, I64) for name in ("table_stride", "table_blocks", "block_size", "num_blocks")),
        *((name, I64) for name in ("q_len", "kv_len", "offset")),
        *((name, P) for name in ("k_scale", "v_scale", "k_zero", "v_zero")),
        *((name, I64) for name in ("k_scale_kind", "v_scale_kind")),
        *((name, Strides) for name in ("k_scale_at", "v_scale_at")),
        ("bias", P),
        *((name, I64) for name in ("bias_dtype", "bias_batch", "bias_head", "bias_query", "bias_key")),
        *((name, P) for name in ("alibi_slopes", "sinks")),
        *((name, F64) for name in ("scale", "soft_cap")),
        ("window", I64),
        *((name, I32) for name in ("causal", "dtype", "cache_dtype", "threads")),
        *((name, P) for name in ("quantised", "quantised_scale")),
    )


def unavailable() -> str | None:
    """Why the library cannot be had, or None."""
    try:
        build.load("attention")
    except KernelBuildError as error:
        return str(error)
    return None


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _floats(x: torch.Tensor | None) -> torch.Tensor | None:
    """float32 and contiguous; the caller keeps it alive until the call is over."""
    return None if x is None else x.to(torch.float32).contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with the values of a head adjacent, copied if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def _common(q, k, window, soft_cap, scale, causal, alibi_slopes, sinks) -> dict:
    return {
        "alibi_slopes": _pointer(alibi_slopes),
        "sinks": _pointer(sinks),
        "scale": scale,
        "soft_cap": soft_cap,
        "window": window or 0,
        "causal": causal,
        "dtype": DTYPES[q.dtype],
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
    alibi_slopes, sinks = _floats(alibi_slopes), _floats(sinks)

    def at(x):
        return Strides(x.stride(0), x.stride(1), x.stride(2))

    arguments = Arguments(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        q_at=at(q),
        k_at=at(k),
        v_at=at(v),
        out_at=at(out),
        sequences=batch,
        heads=heads,
        kv_heads=k.shape[1],
        head_dim=head_dim,
        v_dim=v.shape[3],
        q_len=q_len,
        kv_len=k.shape[2],
        offset=causal_offset,
        bias=_pointer(bias),
        **_common(q, k, window, soft_cap, scale, causal, alibi_slopes, sinks),
    )
    if bias is not None:
        arguments.bias_dtype = DTYPES[bias.dtype]
        arguments.bias_batch, arguments.bias_head, arguments.bias_query, arguments.bias_key = bias.stride()
    build.load("attention").gcu_attention(ctypes.byref(arguments))
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
    if zero_point is not None and kind == 3 and zero_point.stride() != scale.stride():
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
    held += [scale, zero_point]
    fields |= {f"{name}_scale": scale.data_ptr(), f"{name}_zero": _pointer(zero_point), f"{name}_scale_kind": kind}
    if kind == 3:
        fields[f"{name}_scale_at"] = Strides(scale.stride(0), scale.stride(1), scale.stride(2))


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
    alibi_slopes, sinks, held, fields = _floats(alibi_slopes), _floats(sinks), [], {}
    _scale(fields, "k", k_scale, k_zero_point, held)
    _scale(fields, "v", v_scale, v_zero_point, held)
    arguments = Arguments(
        q=q.data_ptr(),
        k=k_cache.data_ptr(),
        v=v_cache.data_ptr(),
        out=out.data_ptr(),
        q_at=Strides(0, q.stride(1), q.stride(0)),
        k_at=Strides(*k_cache.stride()[:3]),
        v_at=Strides(*v_cache.stride()[:3]),
        out_at=Strides(0, out.stride(1), out.stride(0)),
        sequences=seq_lens.shape[0],
        heads=q.shape[1],
        kv_heads=k_cache.shape[1],
        head_dim=q.shape[2],
        v_dim=v_cache.shape[3],
        tokens=q.shape[0],
        # An empty tensor has no address, and none means "dense".
        block_table=block_table.data_ptr() or query_start_loc.data_ptr(),
        query_start_loc=query_start_loc.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        table_stride=block_table.stride(0),
        table_blocks=block_table.shape[1],
        block_size=k_cache.shape[2],
        num_blocks=k_cache.shape[0],
        **fields,
        **_common(q, k_cache, window, soft_cap, scale, causal, alibi_slopes, sinks),
    )
    if quantised is not None:
        arguments.quantised, arguments.quantised_scale = (x.data_ptr() for x in quantised)
    return None if build.load("attention").gcu_attention(ctypes.byref(arguments)) else out
