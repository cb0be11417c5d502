"""Calls `attention_kernel.py`."""

from __future__ import annotations

import torch

from gcu_compile.kernels.triton.configs import configs
from gcu_compile.kernels.triton.launch import launch, missing, power_of_two, target_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Y_AND_Z = 255  # programs in y and in z that every target takes


def refuses(q, k, v, *args, **kwargs) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    if q.dtype not in FLOATS:
        return f"q is {q.dtype}, not one of {', '.join(map(str, FLOATS))}"
    if q.shape[0] > Y_AND_Z or q.shape[1] > Y_AND_Z:
        return f"{q.shape[1]} heads and {q.shape[0]} batches; a grid has at most {Y_AND_Z} of each"
    if max(x.numel() for x in (q, k, v)) >= 2**31:
        return "offsets do not fit 32 bits"
    return missing()


def run(q, k, v, bias=None, alibi_slopes=None, sinks=None, *, scale, causal=False, causal_offset=0, window=None,
        soft_cap=0.0) -> torch.Tensor:  # fmt: skip
    """`gcu::attention`; see `attention/dense.py`."""
    from gcu_compile.kernels.triton.attention_kernel import attention_kernel

    target = target_of(q)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_dim = v.shape[1:]
    out = q.new_zeros(batch, heads, q_len, v_dim)
    if not out.numel():
        return out
    config = configs("attention", target)[0]
    # The cards get keys as they can load them; one copy, against kv_len reads of it.
    transposed = target != "cuda"
    q, v = _rows(q), _rows(v)
    k = k.transpose(2, 3).contiguous() if transposed else _rows(k)
    strides = [0, 0, 0]
    rows = False
    if bias is not None:
        bias = bias.view((1,) * (4 - bias.dim()) + tuple(bias.shape))
        rows = bias.shape[2] > 1
        bias = bias.expand(*bias.shape[:3], kv_len).contiguous()
        strides = [bias.stride(at) if bias.shape[at] > 1 else 0 for at in range(3)]
        if bias.dtype == torch.bool:
            bias = bias.view(torch.int8)
    per_head = [None if x is None else x.to(torch.float32).contiguous() for x in (alibi_slopes, sinks)]
    launch(
        attention_kernel,
        (-(-q_len // config.tile["BLOCK_M"]), heads, batch),
        config,
        out,
        q,
        k,
        v,
        bias,
        *per_head,
        float(scale),
        q_len,
        kv_len,
        causal_offset,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *strides[:2],
        k.stride(2),
        strides[2],
        KEYS_INNERMOST=transposed,
        HEADS=heads,
        GROUP=heads // kv_heads,
        D=head_dim,
        D_PAD=power_of_two(head_dim, 16),
        DV=v_dim,
        DV_PAD=power_of_two(v_dim, 16),
        BIAS_ROWS=rows,
        BIAS_BOOL=bias is not None and bias.dtype == torch.int8,
        BLOCK_M=config.tile["BLOCK_M"],
        BLOCK_N=config.tile["BLOCK_N"],
        CAUSAL=causal,
        WINDOW=window or 0,
        SOFT_CAP=float(soft_cap),
    )
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last two dimensions contiguous."""
    packed = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    return x if packed else x.contiguous()
