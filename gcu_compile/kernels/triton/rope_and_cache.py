"""Calls `rope_and_cache_kernel.py`: `gcu::rope_and_cache`, and `gcu::write_kv`, which has nothing to rotate."""

from __future__ import annotations

import torch

from gcu_compile.kernels.triton.configs import configs
from gcu_compile.kernels.triton.launch import launch, missing, power_of_two, target_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def refuses(qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, *args, **kwargs) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    for name, x in (("qkv", qkv), ("cos_sin", cos_sin)):
        if x.dtype not in FLOATS:
            return f"{name} is {x.dtype}, not one of {', '.join(map(str, FLOATS))}"
    if k_cache.dtype not in (*FLOATS, torch.int8):
        return f"the cache is {k_cache.dtype}"
    if qkv.stride(1) != 1:
        return "a row of qkv is not contiguous"
    for name, x in (("qkv", qkv), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.numel() and sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) >= 2**31:
            return f"offsets of {name} do not fit 32 bits"
    return missing()


def run(qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm=None, k_norm=None, k_scale=None, v_scale=None,
        k_zero_point=None, v_zero_point=None, k_scale_cache=None, v_scale_cache=None, *, interleaved=False,
        eps=1e-6) -> torch.Tensor:  # fmt: skip
    """`gcu::rope_and_cache`; see `attention/rope.py`."""
    kv_heads, head_dim, v_dim = k_cache.shape[1], k_cache.shape[3], v_cache.shape[3]
    heads = (qkv.shape[1] - kv_heads * (head_dim + v_dim)) // head_dim
    out = qkv.new_empty(qkv.shape[0], heads, head_dim)
    v = qkv[:, (heads + kv_heads) * head_dim :]
    _walk(out, qkv, v, cos_sin.contiguous(), positions, slot_mapping, k_cache, v_cache, q_norm, k_norm, k_scale,
          v_scale, k_zero_point, v_zero_point, k_scale_cache, v_scale_cache, interleaved, eps)  # fmt: skip
    return out


def refuses_write(k, v, slot_mapping, k_cache, v_cache, *args, **kwargs) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    return refuses(k[:, 0], k[:, 0], None, slot_mapping, k_cache, v_cache)


def write(k, v, slot_mapping, k_cache, v_cache, k_scale=None, v_scale=None, k_zero_point=None, v_zero_point=None,
          k_scale_cache=None, v_scale_cache=None) -> None:  # fmt: skip
    """`gcu::write_kv`; see `attention/write.py`."""
    _walk(None, k.reshape(len(k), -1), v.reshape(len(v), -1), None, None, slot_mapping, k_cache, v_cache, None, None,
          k_scale, v_scale, k_zero_point, v_zero_point, k_scale_cache, v_scale_cache, False, 0.0)  # fmt: skip


def _walk(out, qkv, v, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm, k_norm, k_scale, v_scale,
          k_zero_point, v_zero_point, k_scale_cache, v_scale_cache, interleaved, eps) -> None:  # fmt: skip
    """Launch over the tokens; without `cos_sin` nothing rotates, without `out` there are no queries."""
    from gcu_compile.kernels.triton.rope_and_cache_kernel import rope_and_cache_kernel

    tokens, kv_heads, head_dim, v_dim = qkv.shape[0], k_cache.shape[1], k_cache.shape[3], v_cache.shape[3]
    if not tokens:
        return
    heads = 0 if out is None else out.shape[1]
    half = 0 if cos_sin is None else cos_sin.shape[1] // 2
    rest = head_dim - 2 * half
    config = configs("rope_and_cache", target_of(qkv))[0]

    def per_head(x):
        return None if x is None else x.to(torch.float32).expand(kv_heads).contiguous()

    launch(
        rope_and_cache_kernel,
        (min(tokens, config.tile["PROGRAMS"]),),
        config,
        out,
        qkv,
        v,
        cos_sin,
        None if positions is None else positions.to(torch.int32),
        slot_mapping.to(torch.int32),
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        per_head(k_scale),
        per_head(v_scale),
        per_head(k_zero_point),
        per_head(v_zero_point),
        k_scale_cache,
        v_scale_cache,
        float(eps),
        tokens,
        0 if cos_sin is None else cos_sin.shape[0],
        k_cache.shape[0] * k_cache.shape[2],
        k_cache.stride(0),
        v_cache.stride(0),
        exact=True,
        HEADS=heads,
        HEADS_PAD=power_of_two(heads),
        KV_HEADS=kv_heads,
        KV_PAD=power_of_two(kv_heads),
        SIZE=head_dim,
        V_SIZE=v_dim,
        V_PAD=power_of_two(v_dim),
        HALF=half,
        HALF_PAD=power_of_two(half),
        REST=rest,
        REST_PAD=power_of_two(rest),
        INTERLEAVED=interleaved,
        BLOCK=k_cache.shape[2],
        K_HEAD=k_cache.stride(1),
        K_SLOT=k_cache.stride(2),
        K_DIM=k_cache.stride(3),
        V_HEAD=v_cache.stride(1),
        V_SLOT=v_cache.stride(2),
        QUANTISED=k_cache.dtype == torch.int8,
        ROW=qkv.stride(0),
        V_ROW=v.stride(0),
    )
