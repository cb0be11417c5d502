"""Calls `paged_attention_kernel.py`, for `gcu::paged_attention` and for `gcu::mla_attention` on its latents."""

from __future__ import annotations

import torch

from gcu_compile.kernels.triton.configs import configs
from gcu_compile.kernels.triton.launch import launch, missing, power_of_two, target_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_SPLITS = 16


def key_cache(num_blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype, device) -> torch.Tensor:
    """A key cache [num_blocks, kv_heads, block_size, head_dim] as the cards want it: block_size innermost in memory."""
    stored = torch.zeros(num_blocks, kv_heads, head_dim, block_size, dtype=dtype, device=device)
    return stored.transpose(2, 3)


def refuses(q, k_cache, v_cache, block_table, *args, **kwargs) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    if q.dtype not in FLOATS:
        return f"q is {q.dtype}, not one of {', '.join(map(str, FLOATS))}"
    if k_cache.dtype not in (q.dtype, torch.int8) and q.dtype != torch.float32:
        return f"the cache is {k_cache.dtype} and q {q.dtype}: expected q's dtype or int8"
    if k_cache.dtype == torch.float64:
        return "the cache is torch.float64"
    if v_cache.stride(3) != 1 and v_cache.shape[3] > 1:
        return "the values of one head of one token are not adjacent in v_cache"
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.numel() and sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) >= 2**31:
            return f"offsets of {name} do not fit 32 bits"
    if target_of(q) == "gcu300" and k_cache.stride(2) != 1 and min(k_cache.shape[2:]) > 1:
        return (
            "k_cache has head_dim innermost: gcu300's compiler gets transposed tiles wrong. Allocate it with "
            "kernels.triton.paged_attention.key_cache"
        )
    return missing()


def run(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, k_scale=None, v_scale=None, k_zero_point=None,
        v_zero_point=None, alibi_slopes=None, sinks=None, *, scale, causal=True, window=None,
        soft_cap=0.0) -> torch.Tensor:  # fmt: skip
    """`gcu::paged_attention`; see `attention/paged.py`."""
    return attend(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, k_scale, v_scale, k_zero_point,
                  v_zero_point, alibi_slopes, sinks, scale=scale, causal=causal, window=window,
                  soft_cap=soft_cap)  # fmt: skip


def attend(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, k_scale=None, v_scale=None, k_zero_point=None,
           v_zero_point=None, alibi_slopes=None, sinks=None, *, scale, causal, window=None, soft_cap=0.0, tail=0,
           splits=None, config=None) -> torch.Tensor:  # fmt: skip
    """Attention of a batch of sequences.

    Args:
        tail: how many of a head's last values are a tile of their own (the rotated part of a latent cache).
        splits: programs that share a sequence's keys; None: as many as fill the card.
        config: None: the first of the target's.
    """
    from gcu_compile.kernels.triton.paged_attention_kernel import merge_kernel, paged_attention_kernel

    tokens, heads, head_dim = q.shape
    num_blocks, kv_heads, block_size, v_dim = v_cache.shape
    sequences, group = len(seq_lens), heads // kv_heads
    out = q.new_zeros(tokens, heads, v_dim)
    if not tokens or not sequences or not num_blocks:
        return out
    config = config or configs("paged_attention", target_of(q))[0]
    group_pad = power_of_two(group)
    rows = config.tile["ROWS_DECODE" if tokens <= sequences else "ROWS"]
    block_q = max(1, rows // group_pad)
    # One block that is not full per sequence.
    blocks_q = tokens // block_q + sequences
    if splits is None:
        splits = config.tile["PROGRAMS"] // (blocks_q * kv_heads)
    splits = max(1, min(splits, block_table.shape[1], MOST_SPLITS))
    partial = None
    if splits > 1:
        partial = q.new_zeros(tokens, heads, splits, v_dim + 2, dtype=torch.float32)

    def numbers(x, dtype):
        """Per token as it is; one number or one per head as [kv_heads]."""
        if x is None:
            return None
        return x.to(dtype).contiguous() if x.dim() == 3 else x.to(dtype).expand(kv_heads).contiguous()

    per_token = [x is not None and x.dim() == 3 for x in (k_scale, v_scale)]
    if per_token[0] != per_token[1]:  # one form for both: spread the smaller
        shape = v_cache.shape[:3]
        k_scale, v_scale, k_zero_point, v_zero_point = (
            x if x is None or x.dim() == 3 else x.view(1, -1, 1).expand(shape)
            for x in (k_scale, v_scale, k_zero_point, v_zero_point)
        )
    per_head = [None if x is None else x.to(torch.float32).contiguous() for x in (alibi_slopes, sinks)]
    launch(
        paged_attention_kernel,
        (blocks_q, kv_heads, splits),
        config,
        out,
        partial,
        q.contiguous(),
        k_cache,
        v_cache,
        block_table.contiguous(),
        query_start_loc,
        seq_lens,
        numbers(k_scale, torch.float32),
        numbers(v_scale, torch.float32),
        numbers(k_zero_point, torch.int32),
        numbers(v_zero_point, torch.int32),
        *per_head,
        float(scale),
        sequences,
        num_blocks,
        block_table.shape[1],
        k_cache.stride(0),
        v_cache.stride(0),
        kv_heads * block_size,
        HEADS=heads,
        GROUP=group,
        GROUP_PAD=group_pad,
        D=head_dim - tail,
        D_PAD=power_of_two(head_dim - tail, 16),
        DV=v_dim,
        DV_PAD=power_of_two(v_dim, 16),
        TAIL=tail,
        TAIL_PAD=power_of_two(tail, 16),
        K_HEAD=k_cache.stride(1),
        K_SLOT=k_cache.stride(2),
        K_DIM=k_cache.stride(3),
        V_HEAD=v_cache.stride(1),
        V_SLOT=v_cache.stride(2),
        BLOCK=block_size,
        BLOCK_N=max(16, block_size),
        BLOCK_Q=block_q,
        SEQUENCES=power_of_two(sequences),
        SPLITS=splits,
        PER_TOKEN=any(per_token),
        CAUSAL=causal,
        WINDOW=window or 0,
        SOFT_CAP=float(soft_cap),
    )
    if splits > 1:
        launch(
            merge_kernel,
            (tokens * heads,),
            config,
            out,
            partial,
            tokens * heads,
            DV=v_dim,
            DV_PAD=power_of_two(v_dim, 16),
            SPLITS=splits,
            SPLITS_PAD=power_of_two(splits),
        )
    return out


def refuses_mla(q, latent_cache, w_uk, *args, **kwargs) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    cache = latent_cache.unsqueeze(1)
    keys = key_cache(*cache.shape, cache.dtype, "meta") if copies_keys(q) else cache
    return refuses(q, keys, cache, None)


def copies_keys(q: torch.Tensor) -> bool:
    """Whether latents cannot be read as they lie both as keys and as values: one of the two is a transposed tile."""
    return target_of(q) == "gcu300"


def run_mla(q, latent_cache, w_uk, w_uv, block_table, query_start_loc, seq_lens, *, scale, causal=True):
    """`gcu::mla_attention`, absorbed: w_uk moves to the query, w_uv to the output; see `attention/mla.py`.

    All query heads share the one latent "head", whose values are its first `rank` numbers. On gcu300 the latents of the
    batch are copied first, as values and transposed as keys: what the kernel reads then is slices.
    """
    nope, rank = w_uk.shape[1:]
    wide = torch.float32
    latent_q = torch.einsum("thn,hnr->thr", q[..., :nope].to(wide), w_uk.to(wide)).to(q.dtype)
    absorbed = torch.cat([latent_q, q[..., nope:]], dim=-1)
    keys = latent_cache.unsqueeze(1)
    values = keys[..., :rank]
    if copies_keys(q) and seq_lens.numel() and latent_cache.numel():
        keys, values, block_table = _copied(latent_cache, rank, block_table, seq_lens)
    latent = attend(absorbed, keys, values, block_table, query_start_loc, seq_lens, scale=scale, causal=causal,
                    tail=q.shape[2] - nope)  # fmt: skip
    return torch.einsum("thr,hrv->thv", latent.to(wide), w_uv.to(wide)).to(q.dtype)


def _copied(latent_cache, rank: int, block_table, seq_lens):
    """Keys [blocks, 1, block_size, rank + rope] with block_size innermost and values [blocks, 1, block_size, rank] of
    the blocks that a batch can see, and its table of them. Waits for `seq_lens`."""
    blocks, size, _ = latent_cache.shape
    table = block_table[:, : max(1, -(-int(seq_lens.max()) // size))]
    # Beyond a sequence's end a table may hold anything.
    used = latent_cache[table.flatten().clamp(0, blocks - 1).long()]
    keys = used.transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(1)
    values = used[..., :rank].contiguous().unsqueeze(1)
    renamed = torch.arange(table.numel(), dtype=torch.int32, device=table.device).view(table.shape)
    return keys, values, renamed
