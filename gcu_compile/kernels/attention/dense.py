"""`torch.ops.gcu.attention`: contiguous tensors; bidirectional, causal and cross attention."""

from __future__ import annotations

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import checks
from gcu_compile.kernels.attention.softmax import attend, compute_dtype
from gcu_compile.kernels.host import attention as host
from gcu_compile.kernels.triton import attention as triton

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sinks=None, *, "
    "float scale, bool causal=False, SymInt causal_offset=0, SymInt? window=None, float soft_cap=0.0, "
    "Tensor? soft_cap_tensor=None) -> Tensor"
)


def check(q, k, v, bias=None, alibi_slopes=None, sinks=None, *, scale, causal=False, causal_offset=0, window=None,
          soft_cap=0.0, soft_cap_tensor=None) -> None:  # fmt: skip
    """Raise `InvalidInputError` for arguments that have no meaning."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise checks.invalid("attention", name, x.shape, "four dimensions: [batch, heads, length, size]")
        if x.dtype not in checks.FLOATS or x.dtype != q.dtype:
            expected = f"q's, one of {', '.join(map(str, checks.FLOATS))}"
            raise checks.invalid("attention", f"{name}'s dtype", x.dtype, expected)
    batch, heads, q_len, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise checks.invalid("attention", "k", k.shape, f"[{batch}, kv_heads, kv_len, {head_dim}]")
    if v.shape[:3] != k.shape[:3]:
        raise checks.invalid("attention", "v", v.shape, f"[{', '.join(map(str, k.shape[:3]))}, v_dim]")
    if head_dim == 0 or k.shape[1] == 0 or heads % k.shape[1]:
        raise checks.invalid("attention", "q", q.shape, f"heads a multiple of k's {k.shape[1]} and a head_dim above 0")
    if bias is not None:
        full = (batch, heads, q_len, k.shape[2])
        sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if len(sizes) != 4 or any(size not in (1, whole) for size, whole in zip(sizes, full, strict=True)):
            raise checks.invalid("attention", "bias", bias.shape, f"a shape that broadcasts to {full}")
        if bias.dtype != torch.bool and not bias.dtype.is_floating_point:
            raise checks.invalid("attention", "bias's dtype", bias.dtype, "bool or a float")
    checks.per_head("attention", heads, alibi_slopes=alibi_slopes, sinks=sinks)
    checks.numbers("attention", window, soft_cap)
    if soft_cap_tensor is not None and (soft_cap or soft_cap_tensor.dim() or not soft_cap_tensor.is_floating_point()):
        given = f"{list(soft_cap_tensor.shape)} {soft_cap_tensor.dtype} beside a soft cap of {soft_cap}"
        raise checks.invalid("attention", "soft_cap_tensor", given, "a float without dimensions, and no other soft cap")


def eager(q, k, v, bias=None, alibi_slopes=None, sinks=None, *, scale, causal=False, causal_offset=0, window=None,
          soft_cap=0.0, soft_cap_tensor=None) -> torch.Tensor:  # fmt: skip
    """Attention of contiguous tensors; `softmax.py` has the formula.

    Args:
        q: [batch, heads, q_len, head_dim] float32, bfloat16, float16 or float64.
        k: [batch, kv_heads, kv_len, head_dim], same dtype; `heads` is a multiple of `kv_heads`.
        v: [batch, kv_heads, kv_len, v_dim], same dtype.
        bias: broadcasts to [batch, heads, q_len, kv_len]; bool keeps where True, a float is added to the scores.
        alibi_slopes: [heads]; adds slope * (j - i - causal_offset) to the score of query i and key j.
        sinks: [heads]; a logit per head that takes part in the softmax and has no value.
        scale: factor of q . k, before the soft cap.
        causal: key j is visible to query i only if j <= i + causal_offset. `kv_len - q_len` aligns the last query
            with the last key; 0 is what `is_causal=True` means in torch.
        window: key j is visible to query i only if j > i + causal_offset - window; at least 1. It bounds the past
            only, with and without `causal`.
        soft_cap: scores become cap * tanh(score / cap); 0: off.
        soft_cap_tensor: [] float, on the CPU or the device of `q`: a soft cap that is known at run time only, as
            Dynamo makes of a model's number under `dynamic=True`. It is never off: 0 gives what the formula gives.

    Returns:
        [batch, heads, q_len, v_dim], dtype of `q`. Rows that see no key are 0, as in torch's SDPA.

    Raises:
        InvalidInputError: shapes, dtypes or numbers that have no meaning.
    """
    if not checks.is_fake(q, k, v):
        check(q, k, v, bias, alibi_slopes, sinks, scale=scale, window=window, soft_cap=soft_cap,
              soft_cap_tensor=soft_cap_tensor)  # fmt: skip
    positions = torch.arange(q.shape[2], device=q.device) + causal_offset
    return attend(
        q,
        k,
        v,
        positions,
        scale=scale,
        causal=causal,
        window=window,
        soft_cap=soft_cap if soft_cap_tensor is None else soft_cap_tensor.to(compute_dtype(q.dtype)),
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    ).to(q.dtype)


def fake(q, k, v, *args, **kwargs) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def accumulation(q, k, v, *args, **kwargs) -> int:
    """The longest sums: head_dim products in a score, kv_len in an output value."""
    return max(q.shape[3], k.shape[2])


def _kernel(run):
    """`run` behind the checks; it gets the soft cap as a number, however it was given."""

    def call(*args, soft_cap=0.0, soft_cap_tensor=None, **kwargs) -> torch.Tensor:
        check(*args, soft_cap=soft_cap, soft_cap_tensor=soft_cap_tensor, **kwargs)
        if soft_cap_tensor is not None:
            soft_cap = abs(float(soft_cap_tensor))  # tanh is odd: the sign has no effect
        return run(*args, soft_cap=soft_cap, **kwargs)

    return call


def _refuses(refuses):
    """`refuses`, and a cap of 0 at run time, which is "off" in the kernels."""

    def reason(*args, soft_cap_tensor=None, **kwargs) -> str | None:
        if soft_cap_tensor is not None and not abs(float(soft_cap_tensor)) > 0:
            return f"the soft cap is {float(soft_cap_tensor)}"
        return refuses(*args, **kwargs)

    return reason


HOST = registry.Implementation("host_cpp", ("cpu",), _kernel(host.run_dense), _refuses(host.refuses_dense))
TRITON = registry.Implementation("triton", ("cuda", "gcu"), _kernel(triton.run), _refuses(triton.refuses))
OP = registry.register(registry.FusedOp("attention", SCHEMA, eager, fake, accumulation, (HOST, TRITON)))
