"""`torch.ops.gcu.rope_and_cache`: split of qkv, norms of q and k, rotary embedding and the KV write, in one pass."""

from __future__ import annotations

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import checks, touched
from gcu_compile.kernels.attention.softmax import compute_dtype
from gcu_compile.kernels.host import rope as host
from gcu_compile.kernels.triton import rope_and_cache as triton
from gcu_compile.options import debug_checks

NAME = "rope_and_cache"
# Layers whose arguments `_prepare` keeps, a few hundred bytes each.
MOST_PREPARED = 1024
_prepared: dict[tuple, host.Prepared] = {}

SCHEMA = (
    "(Tensor qkv, Tensor cos_sin, Tensor? positions, Tensor slot_mapping, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor? q_norm=None, Tensor? k_norm=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "Tensor? k_zero_point=None, Tensor? v_zero_point=None, Tensor(c!)? k_scale_cache=None, "
    "Tensor(d!)? v_scale_cache=None, *, bool interleaved=False, float eps=1e-6) -> Tensor"
)


def heads_of(qkv, k_cache, v_cache) -> int:
    """Query heads: what `qkv` holds beside keys and values."""
    kv_heads, head_dim, v_dim = k_cache.shape[1], k_cache.shape[3], v_cache.shape[3]
    return (qkv.shape[1] - kv_heads * (head_dim + v_dim)) // head_dim


def check(qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm=None, k_norm=None, *scales,
          interleaved=False, eps=1e-6, **more_scales) -> None:  # fmt: skip
    """Raise `InvalidInputError` for shapes and dtypes that have no meaning. Reads no values."""
    check_layer(qkv, cos_sin, k_cache, v_cache, *scales, **more_scales)
    check_step(qkv, cos_sin.shape[0], positions, slot_mapping, k_cache.shape[3], q_norm, k_norm)


def check_layer(qkv, cos_sin, k_cache, v_cache, k_scale=None, v_scale=None, k_zero_point=None, v_zero_point=None,
                k_scale_cache=None, v_scale_cache=None) -> None:  # fmt: skip
    """The part of `check` that depends on the caches, their scales, `cos_sin`, and dtype and row size of `qkv`."""
    if qkv.dim() != 2 or qkv.dtype not in checks.FLOATS:
        raise checks.invalid(NAME, "qkv", f"{qkv.dtype} {tuple(qkv.shape)}", "floats [tokens, q + k + v sizes]")
    checks.cache(NAME, "k_cache", k_cache)
    checks.cache(NAME, "v_cache", v_cache)
    kv_heads, head_dim, v_dim = k_cache.shape[1], k_cache.shape[3], v_cache.shape[3]
    if v_cache.shape[:3] != k_cache.shape[:3] or v_cache.dtype != k_cache.dtype:
        is_ = f"{v_cache.dtype} {tuple(v_cache.shape)}"
        raise checks.invalid(NAME, "v_cache", is_, f"{k_cache.dtype} {tuple(k_cache.shape[:3])} and any head size")
    heads = heads_of(qkv, k_cache, v_cache)
    if heads < 1 or heads * head_dim + kv_heads * (head_dim + v_dim) != qkv.shape[1] or heads % kv_heads:
        expected = f"(heads + {kv_heads}) * {head_dim} + {kv_heads} * {v_dim}, heads a multiple of {kv_heads}"
        raise checks.invalid(NAME, "qkv's row", qkv.shape[1], expected)
    rotary = cos_sin.shape[-1]
    if cos_sin.dim() != 2 or rotary % 2 or not 0 <= rotary <= head_dim:
        raise checks.invalid(NAME, "cos_sin", cos_sin.shape, f"[rows, even size up to {head_dim}]")
    sides(NAME, k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point, k_scale_cache, v_scale_cache)


def check_step(qkv, rows, positions, slot_mapping, head_dim, q_norm=None, k_norm=None) -> None:
    """The rest of `check`: what the tokens of a call bring. `rows`: of `cos_sin`."""
    tokens = qkv.shape[:1]
    if positions is not None and (positions.shape != tokens or positions.dtype != torch.int64):
        raise checks.invalid(NAME, "positions", f"{positions.dtype} {tuple(positions.shape)}", f"int64 [{tokens[0]}]")
    if positions is None and rows < tokens[0]:
        raise checks.invalid(NAME, "cos_sin's rows", rows, f"{tokens[0]} rows, one per token, without positions")
    if slot_mapping.shape != tokens or slot_mapping.dtype != torch.int64:
        is_ = f"{slot_mapping.dtype} {tuple(slot_mapping.shape)}"
        raise checks.invalid(NAME, "slot_mapping", is_, f"int64 [{tokens[0]}]")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and norm.shape != (head_dim,):
            raise checks.invalid(NAME, name, norm.shape, f"[{head_dim}]")


def sides(op, k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point, k_scale_cache, v_scale_cache) -> None:
    """Raise `InvalidInputError` for scales that do not fit their cache."""
    for name, cache, scale, zero, scales in (
        ("k", k_cache, k_scale, k_zero_point, k_scale_cache),
        ("v", v_cache, v_scale, v_zero_point, v_scale_cache),
    ):
        if scales is None:
            checks.scales(op, name, cache, scale, zero)
            if scale is not None and scale.dim() == 3:
                expected = f"one number or [{cache.shape[1]}]; scales per token and head go into {name}_scale_cache"
                raise checks.invalid(op, f"{name}_scale", scale.shape, expected)
            continue
        wrong = cache.dtype != torch.int8 or scale is not None or zero is not None or scales.dtype != torch.float32
        if wrong or scales.shape != cache.shape[:3]:
            expected = f"float32 {tuple(cache.shape[:3])} for an int8 cache, without scale and zero point"
            raise checks.invalid(op, f"{name}_scale_cache", f"{scales.dtype} {tuple(scales.shape)}", expected)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding (Su et al., RoFormer, 2021) of the first 2 * cos.shape[-1] values of each head.

    Args:
        x: [tokens, heads, head_dim].
        cos, sin: [tokens, rotary // 2].
        interleaved: pairs are (0, 1), (2, 3), ... (GPT-J) rather than (0, half), (1, half + 1), ... (NeoX).
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def normalise(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMS norm of every head: x / sqrt(mean(x^2) + eps) * weight."""
    if weight is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


def write(cache, x, slots, scale, zero_point, scale_cache) -> None:
    """Store `x` [tokens, kv_heads, size] at `slots`, quantised where `cache` is int8."""
    keep = slots >= 0
    block, offset = slots[keep] // cache.shape[2], slots[keep] % cache.shape[2]
    x = x[keep]
    if scale_cache is not None:
        scale = x.abs().amax(-1) / 127
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        scale_cache[block, :, offset] = scale.to(scale_cache.dtype)
        scale = scale.unsqueeze(-1)
    elif scale is not None:
        scale = scale.to(x.dtype).view(1, -1, 1)
    if scale is not None:
        x = x / scale
    if zero_point is not None:
        x = x + zero_point.to(x.dtype).view(1, -1, 1)
    if cache.dtype == torch.int8:
        x = x.round().clamp(-128, 127)
    cache[block, :, offset] = x.to(cache.dtype)


def eager(qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm=None, k_norm=None, k_scale=None,
          v_scale=None, k_zero_point=None, v_zero_point=None, k_scale_cache=None, v_scale_cache=None, *,
          interleaved=False, eps=1e-6) -> torch.Tensor:  # fmt: skip
    """Split `qkv`, normalise q and k, rotate them, write k and v into the cache. Arithmetic is float32 (float64 for
    float64) and each result is rounded once.

    Which scaling of the rotary embedding a model has (linear, dynamic NTK, Llama 3, YaRN, LongRoPE) is in the numbers
    of `cos_sin`; M-RoPE passes one row per token, made from its three positions, and no `positions`.

    Args:
        qkv: [tokens, heads * head_dim + kv_heads * head_dim + kv_heads * v_dim].
        cos_sin: [rows, rotary]: cosines, then sines, of rotary // 2 angles each; rotary <= head_dim, the rest of a
            head is not rotated.
        positions: [tokens] int64, each token's row of `cos_sin`; None: token t has row t.
        slot_mapping: [tokens] int64: block * block_size + offset; -1: not written. No slot may occur twice.
        k_cache, v_cache: [num_blocks, kv_heads, block_size, head_dim or v_dim], written; float or int8.
        q_norm, k_norm: [head_dim] weights of an RMS norm per head, before the rotation.
        k_scale, v_scale, k_zero_point, v_zero_point: for int8 caches: one number or [kv_heads]; the cache gets
            round(x / scale + zero_point), ties to even, saturated to [-128, 127].
        k_scale_cache, v_scale_cache: [num_blocks, kv_heads, block_size] float32, written: int8 caches get a scale per
            token and head instead, its largest magnitude / 127 (1 where all is 0).
        interleaved: pairs of the rotation, see `rotate`.
        eps: of the RMS norm.

    Returns:
        q: [tokens, heads, head_dim], rotated, dtype of `qkv`; rows that are not written to the cache too.

    Raises:
        InvalidInputError: shapes, dtypes, slots or positions that have no meaning.
    """
    heads, head_dim = heads_of(qkv, k_cache, v_cache), k_cache.shape[3]
    if checks.is_fake(qkv, k_cache):
        return qkv.new_empty((qkv.shape[0], heads, head_dim))
    check(qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm, k_norm, k_scale, v_scale, k_zero_point,
          v_zero_point, k_scale_cache, v_scale_cache)  # fmt: skip
    values(qkv, cos_sin, positions, slot_mapping, k_cache)
    kv_heads, tokens = k_cache.shape[1], qkv.shape[0]
    x = qkv.to(compute_dtype(qkv.dtype))
    q, k, v = x.split([heads * head_dim, kv_heads * head_dim, kv_heads * v_cache.shape[3]], dim=1)
    rows = (cos_sin[:tokens] if positions is None else cos_sin[positions]).to(x.dtype)
    cos, sin = rows.chunk(2, dim=-1)
    q = rotate(normalise(q.reshape(tokens, heads, head_dim), q_norm, eps), cos, sin, interleaved)
    k = rotate(normalise(k.reshape(tokens, kv_heads, head_dim), k_norm, eps), cos, sin, interleaved)
    write(k_cache, k, slot_mapping, k_scale, k_zero_point, k_scale_cache)
    write(v_cache, v.reshape(tokens, kv_heads, -1), slot_mapping, v_scale, v_zero_point, v_scale_cache)
    return q.to(qkv.dtype)


def values(qkv, cos_sin, positions, slot_mapping, k_cache) -> None:
    """Raise `InvalidInputError` for slots and positions out of range. Copies them to the CPU."""
    checks.slot_values(NAME, slot_mapping, k_cache.shape[0] * k_cache.shape[2])
    for token, row in enumerate(() if positions is None else positions.tolist()):
        if not 0 <= row < cos_sin.shape[0]:
            expected = f"a row from 0 to {cos_sin.shape[0] - 1}"
            raise checks.invalid(NAME, f"positions[{token}]", row, expected)


def fake(qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, *args, **kwargs) -> torch.Tensor:
    return qkv.new_empty((qkv.shape[0], heads_of(qkv, k_cache, v_cache), k_cache.shape[3]))


def accumulation(qkv, cos_sin, positions, slot_mapping, k_cache, *args, **kwargs) -> int:
    """Two products in a rotated value; head_dim squares where there is a norm."""
    return k_cache.shape[3]


def _refuses_host(qkv, cos_sin, positions, slot_mapping, k_cache, *args, **kwargs) -> str | None:
    return host.refuses(qkv, k_cache, cos_sin)


def _prepare(qkv, *layer, **settings) -> host.Prepared:
    """Check what a layer brings and convert it, unless the last calls met the same: that is two thirds of a short call.

    The result follows from the key: where the tensors lie, their dtypes, shapes and strides, never their values.
    """
    places = [None if x is None else (x.data_ptr(), x.dtype, x.shape, x.stride()) for x in layer]
    key = qkv.dtype, qkv.shape[1:], *places, *settings.items()
    prepared = _prepared.get(key)
    if prepared is None:
        check_layer(qkv, *layer)
        cos_sin, k_cache, v_cache, *_ = layer
        if cos_sin.stride(1) != 1:
            layer = (cos_sin.contiguous(), *layer[1:])
        prepared = host.Prepared(qkv.dtype, heads_of(qkv, k_cache, v_cache), *layer, **settings)
        if not prepared.converted and layer[0] is cos_sin:
            if len(_prepared) >= MOST_PREPARED:
                _prepared.clear()
            _prepared[key] = prepared
    return prepared


def _run_host(qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm=None, k_norm=None, k_scale=None,
              v_scale=None, k_zero_point=None, v_zero_point=None, k_scale_cache=None, v_scale_cache=None, *,
              interleaved=False, eps=1e-6) -> torch.Tensor:  # fmt: skip
    prepared = _prepare(qkv, cos_sin, k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point, k_scale_cache,
                        v_scale_cache, interleaved=interleaved, eps=eps)  # fmt: skip
    check_step(qkv, prepared.rows, positions, slot_mapping, prepared.head_dim, q_norm, k_norm)
    if debug_checks():
        values(qkv, cos_sin, positions, slot_mapping, k_cache)
    out = host.run(prepared, qkv, positions, slot_mapping, q_norm, k_norm)
    if out is None:  # the kernel met a slot or a position out of range: the check that names it
        values(qkv, cos_sin, positions, slot_mapping, k_cache)
    return out


def _run_triton(qkv, cos_sin, positions, slot_mapping, k_cache, *args, **kwargs) -> torch.Tensor:
    check(qkv, cos_sin, positions, slot_mapping, k_cache, *args, **kwargs)
    if debug_checks():  # a kernel on a device cannot raise
        values(qkv, cos_sin, positions, slot_mapping, k_cache)
    return triton.run(qkv, cos_sin, positions, slot_mapping, k_cache, *args, **kwargs)


HOST = registry.Implementation("host_cpp", ("cpu",), _run_host, _refuses_host)
TRITON = registry.Implementation("triton", ("cuda", "gcu"), _run_triton, triton.refuses)
OP = registry.register(
    registry.FusedOp(
        NAME, SCHEMA, eager, fake, accumulation, (HOST, TRITON), touched.by_slots, code_steps=1
    )
)
