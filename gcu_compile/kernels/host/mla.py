"""`gcu::mla_attention` on the host: `attention.cpp` on latents, or on keys and values made of them.

    absorbed      w_uk moves to the query, w_uv to the output; all heads share one latent "head" of rank + rope, whose
                  values are its first `rank` numbers. Reads a latent per key and makes nothing: decode, verify.
    decompressed  keys and values of a sequence are made by a product and read by every query: prefill.

A sequence goes the way that multiplies less. Per query, key and head, absorbed costs rank + rope + rank products and
decompressed nope + rope + v_dim, besides rank * (nope + v_dim) once per key and head. They are equal at
rank * (nope + v_dim) / (2 * rank - nope - v_dim) queries: 170 for DeepSeek-V2 (512, 128, 128).
"""

from __future__ import annotations

import torch

from gcu_compile.kernels.attention import checks
from gcu_compile.kernels.host import attention

# Decompressed keys and values held at once; heads are taken in groups that fit.
MOST_BYTES = 256 << 20


def refuses(q, latent_cache, *args, **kwargs) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    return attention.refuses_paged(q, latent_cache)


def fewest_decompressed(rank: int, nope: int, v_dim: int) -> float:
    """Queries of one sequence from which making its keys and values costs less than going without."""
    saved = 2 * rank - nope - v_dim
    return rank * (nope + v_dim) / saved if saved > 0 else float("inf")


def run(q, latent_cache, w_uk, w_uv, block_table, query_start_loc, seq_lens, *, scale, causal=True):
    """See `attention/mla.py`. None: lengths or table entries are out of range."""
    (nope, rank), v_dim = w_uk.shape[1:], w_uv.shape[2]
    starts = query_start_loc.tolist()
    least = fewest_decompressed(rank, nope, v_dim)
    few, many = [], []
    for i, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        (many if end - begin >= least else few).append(i)
    if not many:
        return absorbed(q, latent_cache, w_uk, w_uv, block_table, query_start_loc, seq_lens, scale, causal)
    # A table entry out of range would be an index of torch's: negative ones wrap.
    sizes = q.shape[0], latent_cache.shape[0], latent_cache.shape[1]
    checks.paged_values("mla_attention", *sizes, block_table, query_start_loc, seq_lens, causal, None)
    output = q.new_zeros(*q.shape[:2], v_dim)
    for i in many:
        length, own = int(seq_lens[i]), slice(starts[i], starts[i + 1])
        blocks = block_table[i, : -(-length // latent_cache.shape[1])].long()
        latent = latent_cache[blocks].flatten(0, 1)[:length]
        decompressed(q[own], latent, w_uk, w_uv, scale, causal, output[own])
    if few:
        tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in few])
        loc = torch.tensor([0, *(starts[i + 1] - starts[i] for i in few)], dtype=torch.int32).cumsum(0).int()
        part = absorbed(q[tokens], latent_cache, w_uk, w_uv, block_table[few], loc, seq_lens[few], scale, causal)
        output[tokens] = part
    return output


def absorbed(q, latent_cache, w_uk, w_uv, block_table, query_start_loc, seq_lens, scale, causal):
    """[tokens, heads, v_dim] by products of queries with latents; None: a length or an entry is out of range."""
    nope, rank = w_uk.shape[1:]
    turned = q.new_empty(*q.shape[:2], latent_cache.shape[2])
    turned[..., rank:] = q[..., nope:]
    torch.bmm(q[..., :nope].transpose(0, 1), w_uk, out=turned[..., :rank].transpose(0, 1))
    keys = latent_cache.unsqueeze(1)
    tables = block_table, query_start_loc, seq_lens
    latent = attention.run_paged(turned, keys, keys[..., :rank], *tables, scale=scale, causal=causal)
    if latent is None:
        return None
    output = q.new_empty(*q.shape[:2], w_uv.shape[2])
    torch.bmm(latent.transpose(0, 1), w_uv, out=output.transpose(0, 1))
    return output


def decompressed(q, latent, w_uk, w_uv, scale, causal, output) -> None:
    """Attention of one sequence into `output` [queries, heads, v_dim].

    Args:
        q: [queries, heads, nope + rope], the last queries of the sequence.
        latent: [keys, rank + rope].
    """
    queries, heads, size = q.shape
    keys, (nope, rank) = latent.shape[0], w_uk.shape[1:]
    one_head = keys * (size + w_uv.shape[2]) * q.element_size()
    step = max(1, MOST_BYTES // max(1, one_head))
    for first in range(0, heads, step):
        own = slice(first, first + step)
        k = q.new_empty(w_uk[own].shape[0], keys, size)
        k[..., :nope] = latent[:, :rank] @ w_uk[own].transpose(1, 2)
        k[..., nope:] = latent[:, rank:]
        v = latent[:, :rank] @ w_uv[own]
        q_own = q[:, own].transpose(0, 1)
        done = attention.run_dense(q_own[None], k[None], v[None], scale=scale, causal=causal,
                                   causal_offset=keys - queries)  # fmt: skip
        output[:, own] = done[0].transpose(0, 1)
