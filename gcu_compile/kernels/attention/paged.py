"""`torch.ops.gcu.paged_attention`: batches of sequences of any lengths against a paged KV cache."""

from __future__ import annotations

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import checks, touched
from gcu_compile.kernels.attention.softmax import attend, compute_dtype
from gcu_compile.kernels.host import attention as host
from gcu_compile.kernels.triton import paged_attention as triton
from gcu_compile.options import debug_checks

TENSORS = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor query_start_loc, Tensor seq_lens, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? k_zero_point=None, Tensor? v_zero_point=None, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, *, "
    "float scale, bool causal=True, SymInt? window=None, float soft_cap=0.0)"
)


def check(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, k_scale=None, v_scale=None,
          k_zero_point=None, v_zero_point=None, alibi_slopes=None, sinks=None, *, scale, causal=True, window=None,
          soft_cap=0.0) -> None:  # fmt: skip
    """Raise `InvalidInputError` for shapes, dtypes and numbers that have no meaning. Reads no values."""
    op = "paged_attention"
    if q.dim() != 3 or q.dtype not in checks.FLOATS:
        raise checks.invalid(op, "q", f"{q.dtype} {tuple(q.shape)}", "floats [tokens, heads, head_dim]")
    checks.cache(op, "k_cache", k_cache)
    checks.cache(op, "v_cache", v_cache)
    heads, head_dim = q.shape[1:]
    if k_cache.shape[3] != head_dim or head_dim == 0:
        raise checks.invalid(op, "k_cache's head size", k_cache.shape[3], f"q's, {head_dim}, above 0")
    if v_cache.shape[:3] != k_cache.shape[:3] or v_cache.dtype != k_cache.dtype:
        is_ = f"{v_cache.dtype} {tuple(v_cache.shape)}"
        raise checks.invalid(op, "v_cache", is_, f"{k_cache.dtype} {tuple(k_cache.shape[:3])} and any head size")
    if heads == 0 or k_cache.shape[1] == 0 or heads % k_cache.shape[1]:
        raise checks.invalid(op, "q's heads", heads, f"a multiple of the cache's {k_cache.shape[1]}")
    checks.scales(op, "k", k_cache, k_scale, k_zero_point)
    checks.scales(op, "v", v_cache, v_scale, v_zero_point)
    checks.paged_layout(op, block_table, query_start_loc, seq_lens)
    checks.per_head(op, heads, alibi_slopes=alibi_slopes, sinks=sinks)
    checks.numbers(op, window, soft_cap)


def dequantise(x: torch.Tensor, scale, zero_point, blocks, dtype: torch.dtype) -> torch.Tensor:
    """The values of `blocks` of cache `x`: [blocks, kv_heads, block_size, size] in `dtype`."""
    values = x[blocks].to(dtype)
    if scale is None:
        return values

    def spread(numbers):
        if numbers.dim() == 3:
            return numbers[blocks].unsqueeze(-1)
        return numbers.view(1, -1, 1, 1)

    if zero_point is not None:
        values = values - spread(zero_point).to(dtype)
    return values * spread(scale).to(dtype)


def eager(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, k_scale=None, v_scale=None, k_zero_point=None,
          v_zero_point=None, alibi_slopes=None, sinks=None, *, scale, causal=True, window=None,
          soft_cap=0.0) -> torch.Tensor:  # fmt: skip
    """Attention of a batch of sequences whose keys and values lie in blocks; `softmax.py` has the formula.

    Sequence s owns tokens query_start_loc[s]:query_start_loc[s + 1] of `q`. They are the last tokens of its
    seq_lens[s] keys (decode: one of many; prefill: all of them; chunked prefill: some), so that the last query has
    position seq_lens[s] - 1. Key j of sequence s lies in block block_table[s, j // block_size].

    Args:
        q: [tokens, heads, head_dim] float32, bfloat16, float16 or float64.
        k_cache: [num_blocks, kv_heads, block_size, head_dim] of those dtypes or int8; any strides with the last one 1.
        v_cache: [num_blocks, kv_heads, block_size, v_dim], dtype of `k_cache`.
        block_table: [sequences, blocks] int32; entries that no visible key needs may hold anything.
        query_start_loc: [sequences + 1] int32; tokens past its last number are padding and give 0.
        seq_lens: [sequences] int32.
        k_scale, v_scale: float32, for int8 caches only: one number, [kv_heads], or [num_blocks, kv_heads, block_size]
            (one per token and head). A value is (cache - zero_point) * scale.
        k_zero_point, v_zero_point: int32, shaped as their scale.
        alibi_slopes: [heads]; adds slope * (key position - query position).
        sinks: [heads]; a logit per head that takes part in the softmax and has no value.
        scale: factor of q . k, before the soft cap.
        causal: a query sees the keys up to its own position; else all keys of its sequence.
        window: a query at position i sees only keys j > i - window; at least 1.
        soft_cap: scores become cap * tanh(score / cap); 0: off.

    Returns:
        [tokens, heads, v_dim], dtype of `q`. A query that sees no key gives 0.

    Raises:
        InvalidInputError: shapes, dtypes, numbers, lengths or table entries that have no meaning.
    """
    if checks.is_fake(q, k_cache):
        return fake(q, k_cache, v_cache)
    check(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, k_scale, v_scale,
          k_zero_point, v_zero_point, alibi_slopes, sinks, scale=scale, window=window, soft_cap=soft_cap)  # fmt: skip
    num_blocks, _, block_size, _ = k_cache.shape
    values(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, causal=causal, window=window)
    output = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[3])
    starts = query_start_loc.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        begin, end = starts[i], starts[i + 1]
        if begin == end:
            continue
        offset = length - (end - begin)
        # Blocks wholly before the window are not looked at: their entries may be stale.
        first = 0 if window is None else max(0, offset - window + 1) // block_size
        blocks = block_table[i, first : -(-length // block_size)].long()
        k, v = (
            dequantise(x, s, z, blocks, compute_dtype(q.dtype)).transpose(0, 1).flatten(1, 2)
            for x, s, z in ((k_cache, k_scale, k_zero_point), (v_cache, v_scale, v_zero_point))
        )
        keys = length - first * block_size
        output[begin:end] = attend(
            q[begin:end].transpose(0, 1).unsqueeze(0),
            k[:, :keys].unsqueeze(0),
            v[:, :keys].unsqueeze(0),
            torch.arange(end - begin, device=q.device) + offset - first * block_size,
            scale=scale,
            causal=causal,
            window=window,
            soft_cap=soft_cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )[0].transpose(0, 1).to(q.dtype)
    return output


def values(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, *args, causal=True, window=None,
           **kwargs) -> None:  # fmt: skip
    """Raise `InvalidInputError` for lengths or table entries out of range; see `checks.paged_values`."""
    sizes = q.shape[0], k_cache.shape[0], k_cache.shape[2]
    checks.paged_values("paged_attention", *sizes, block_table, query_start_loc, seq_lens, causal, window)


def fake(q, k_cache, v_cache, *args, **kwargs) -> torch.Tensor:
    return q.new_empty((*q.shape[:2], v_cache.shape[3]))


def accumulation(q, k_cache, v_cache, block_table, *args, **kwargs) -> int:
    """The longest sums: head_dim products in a score, the keys of the longest sequence in an output value."""
    return max(q.shape[2], block_table.shape[1] * k_cache.shape[2])


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per token: `x` ~ values * scale.

    Args:
        x: [tokens, ...].

    Returns:
        int8 of the shape of `x`; float32 [tokens, 1], the largest magnitude of the token / 127 (1 where all is 0).
    """
    wide = x.to(compute_dtype(x.dtype)).flatten(1)
    scale = wide.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (wide / scale).round().clamp(-128, 127).to(torch.int8).view(x.shape), scale.float()


def eager_int8(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention` with its output quantised per token for a W8A8 projection, by `quantise_rows`.

    Returns:
        int8 [tokens, heads, v_dim] and float32 [tokens, 1].
    """
    if checks.is_fake(args[0], args[1]):
        return fake_int8(*args, **kwargs)
    return quantise_rows(eager(*args, **kwargs))


def fake_int8(q, k_cache, v_cache, *args, **kwargs):
    values = q.new_empty((*q.shape[:2], v_cache.shape[3]), dtype=torch.int8)
    return values, q.new_empty((q.shape[0], 1), dtype=torch.float32)


def _run_host(*args, quantised=None, **kwargs) -> torch.Tensor:
    check(*args, **kwargs)
    output = host.run_paged(*args, quantised=quantised, **kwargs)
    if output is None:  # the kernel met a length or an entry out of range: the check that names it
        values(*args, **kwargs)
    return output


def _run_host_int8(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    quantised = fake_int8(*args)
    _run_host(*args, quantised=quantised, **kwargs)
    return quantised


def _run_triton(*args, **kwargs) -> torch.Tensor:
    check(*args, **kwargs)
    if debug_checks():  # a kernel on a device cannot raise
        values(*args, **kwargs)
    return triton.run(*args, **kwargs)


def _run_triton_int8(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise_rows(_run_triton(*args, **kwargs))


def _implementations(run_host, run_triton):
    return (
        registry.Implementation("host_cpp", ("cpu",), run_host, host.refuses_paged),
        registry.Implementation("triton", ("cuda", "gcu"), run_triton, triton.refuses),
    )


OP = registry.register(
    registry.FusedOp(
        "paged_attention",
        TENSORS + " -> Tensor",
        eager,
        fake,
        accumulation,
        _implementations(_run_host, _run_triton),
        touched.by_table,
    )
)
OP_INT8 = registry.register(
    registry.FusedOp(
        "paged_attention_int8",
        TENSORS + " -> (Tensor, Tensor)",
        eager_int8,
        fake_int8,
        accumulation,
        _implementations(_run_host_int8, _run_triton_int8),
        touched.by_table,
        code_steps=1,
    )
)
