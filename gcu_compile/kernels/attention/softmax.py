"""The meaning of attention: what every operation of this folder computes for one set of queries and keys.

    s = soft_cap(q . k * scale) + alibi + bias          soft_cap(x) = cap * tanh(x / cap), off at 0
    p = exp(s - max) / sum exp(s - max)                 over the visible keys, a sink adds exp(sink - max) to the sum
    output = p . v

A query that sees no key (all masked, or a bias of -inf everywhere) gives 0. That is what
`torch.nn.functional.scaled_dot_product_attention` gives since torch 2.5, on every backend.
"""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible(query_positions, key_positions, causal: bool, window):
    """[queries, keys] bool, or None where every key is visible.

    Key j is visible to query i if `j <= i` (causal) and `j > i - window` (window, at least 1).
    """
    distance = query_positions.unsqueeze(-1) - key_positions
    mask = None
    if causal:
        mask = distance >= 0
    if window is not None:
        near = distance < window
        mask = near if mask is None else mask & near
    return mask


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_positions: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one batch.

    Args:
        q: [batch, heads, q_len, head_dim]; head h reads key head `h // (heads // kv_heads)`.
        k: [batch, kv_heads, kv_len, head_dim]; v: [batch, kv_heads, kv_len, v_dim].
        query_positions: [q_len] int64, on the axis on which key j has position j.
        bias: broadcasts to [batch, heads, q_len, kv_len]; bool keeps where True, else it is added.
        alibi_slopes, sinks: [heads].
        soft_cap: a tensor [] is never off, whatever it holds.

    Returns:
        [batch, heads, q_len, v_dim] in `compute_dtype(q.dtype)`, not yet rounded to that of `q`.
    """
    wide = compute_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(groups, dim=1) if groups > 1 else x.to(wide) for x in (k, v))
    scores = (q.to(wide) @ k.transpose(-1, -2)) * scale
    if isinstance(soft_cap, torch.Tensor) or soft_cap > 0:
        scores = soft_cap * (scores / soft_cap).tanh()
    key_positions = torch.arange(k.shape[2], device=q.device)
    if alibi_slopes is not None:
        distance = (key_positions - query_positions.unsqueeze(-1)).to(wide)
        scores = scores + alibi_slopes.to(wide).view(1, -1, 1, 1) * distance
    mask = visible(query_positions, key_positions, causal, window)
    if bias is not None and bias.dtype == torch.bool:
        mask = bias if mask is None else mask & bias
    elif bias is not None:
        scores = scores + bias.to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)
    weights = weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return weights[..., : k.shape[2]] @ v
