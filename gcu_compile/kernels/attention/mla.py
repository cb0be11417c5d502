"""`torch.ops.gcu.mla_attention`: multi-head latent attention (DeepSeek-V2, 2024) on its latent cache."""

from __future__ import annotations

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import checks, touched
from gcu_compile.kernels.attention.paged import eager as paged
from gcu_compile.kernels.attention.softmax import compute_dtype
from gcu_compile.kernels.host import mla as host
from gcu_compile.kernels.triton import paged_attention as triton
from gcu_compile.options import resolve

SCHEMA = (
    "(Tensor q, Tensor latent_cache, Tensor w_uk, Tensor w_uv, Tensor block_table, Tensor query_start_loc, "
    "Tensor seq_lens, *, float scale, bool causal=True) -> Tensor"
)


def check(q, latent_cache, w_uk, w_uv, block_table, query_start_loc, seq_lens, *, scale, causal=True) -> None:
    """Raise `InvalidInputError` for shapes and dtypes that have no meaning. Reads no values."""
    op = "mla_attention"
    if q.dim() != 3 or q.dtype not in checks.FLOATS:
        raise checks.invalid(op, "q", f"{q.dtype} {tuple(q.shape)}", "floats [tokens, heads, nope + rope]")
    if latent_cache.dim() != 3:
        raise checks.invalid(op, "latent_cache", latent_cache.shape, "[num_blocks, block_size, rank + rope]")
    checks.cache(op, "latent_cache", latent_cache.unsqueeze(1))
    heads = q.shape[1]
    if w_uk.dim() != 3 or w_uk.shape[0] != heads or not 0 <= w_uk.shape[1] <= q.shape[2]:
        raise checks.invalid(op, "w_uk", w_uk.shape, f"[{heads}, nope up to {q.shape[2]}, rank]")
    nope, rank = w_uk.shape[1:]
    if w_uv.dim() != 3 or w_uv.shape[:2] != (heads, rank):
        raise checks.invalid(op, "w_uv", w_uv.shape, f"[{heads}, {rank}, v_dim]")
    if latent_cache.shape[2] != rank + q.shape[2] - nope:
        expected = f"rank {rank} + rope {q.shape[2] - nope}"
        raise checks.invalid(op, "latent_cache's last size", latent_cache.shape[2], expected)
    for name, x in (("latent_cache", latent_cache), ("w_uk", w_uk), ("w_uv", w_uv)):
        if x.dtype != q.dtype:
            raise checks.invalid(op, f"{name}'s dtype", x.dtype, f"q's, {q.dtype}")
    checks.paged_layout(op, block_table, query_start_loc, seq_lens)


def eager(q, latent_cache, w_uk, w_uv, block_table, query_start_loc, seq_lens, *, scale, causal=True) -> torch.Tensor:
    """Attention whose keys and values are made from one cached latent per token.

        key of head h   = [latent @ w_uk[h]^T | rope part, shared by all heads]
        value of head h = latent @ w_uv[h]

    An implementation may make keys and values first (decompressed, good for prefill) or move w_uk to the query and
    w_uv to the output (absorbed, good for decode): q . (latent @ w_uk^T) = (q @ w_uk) . latent.

    Args:
        q: [tokens, heads, nope + rope]; the last `rope` values are rotated already.
        latent_cache: [num_blocks, block_size, rank + rope]: the normalised latent, then the rotated shared key.
        w_uk: [heads, nope, rank]; w_uv: [heads, rank, v_dim].
        block_table, query_start_loc, seq_lens, scale, causal: as for `paged_attention`.

    Returns:
        [tokens, heads, v_dim], dtype of `q`.

    Raises:
        InvalidInputError: shapes, dtypes, lengths or table entries that have no meaning.
    """
    if checks.is_fake(q, latent_cache):
        return fake(q, latent_cache, w_uk, w_uv)
    tables = block_table, query_start_loc, seq_lens
    check(q, latent_cache, w_uk, w_uv, *tables, scale=scale)
    values(q, latent_cache, w_uk, w_uv, *tables, causal=causal)
    rank, wide = w_uk.shape[2], compute_dtype(q.dtype)
    # A hole's latent is never read by `paged`, so that making keys and values of the whole cache is only slow.
    latent = latent_cache[..., :rank].to(wide)
    shared = latent_cache[..., rank:].to(wide).unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    keys = torch.cat([torch.einsum("bsr,hnr->bhsn", latent, w_uk.to(wide)), shared], dim=-1)
    made = torch.einsum("bsr,hrv->bhsv", latent, w_uv.to(wide))
    return paged(q.to(wide), keys, made, *tables, scale=scale, causal=causal).to(q.dtype)


def fake(q, latent_cache, w_uk, w_uv, *args, **kwargs) -> torch.Tensor:
    return q.new_empty((*q.shape[:2], w_uv.shape[2]))


def accumulation(q, latent_cache, w_uk, w_uv, block_table, *args, **kwargs) -> int:
    """The longest sums: rank products in a key, the keys of the longest sequence in an output value."""
    return max(latent_cache.shape[2], block_table.shape[1] * latent_cache.shape[1])


def values(q, latent_cache, w_uk, w_uv, block_table, query_start_loc, seq_lens, *, causal=True, **kwargs) -> None:
    """Raise `InvalidInputError` for lengths or table entries out of range; see `checks.paged_values`."""
    sizes = q.shape[0], latent_cache.shape[0], latent_cache.shape[1]
    checks.paged_values("mla_attention", *sizes, block_table, query_start_loc, seq_lens, causal, None)


def _run_host(*args, **kwargs) -> torch.Tensor:
    check(*args, **kwargs)
    output = host.run(*args, **kwargs)
    if output is None:  # the kernel met a length or an entry out of range: the check that names it
        values(*args, **kwargs)
    return output


def _run_triton(*args, **kwargs) -> torch.Tensor:
    check(*args, **kwargs)
    if resolve().debug_checks:  # a kernel on a device cannot raise
        values(*args, **kwargs)
    return triton.run_mla(*args, **kwargs)


HOST = registry.Implementation("host_cpp", ("cpu",), _run_host, host.refuses)
TRITON = registry.Implementation("triton", ("cuda", "gcu"), _run_triton, triton.refuses_mla)
OP = registry.register(
    registry.FusedOp("mla_attention", SCHEMA, eager, fake, accumulation, (HOST, TRITON), touched.by_table)
)
