"""Rows of qkv -> norm, rotation, and the write of keys and values into the paged cache, one pass per token.

A head is three tiles: the two halves that rotate into each other (neighbouring pairs if INTERLEAVED), and the rest.
Slots, blocks and rows of the cosine table are scalars, so that every access is one slice.
"""

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """The nearest integer of a float32 below 2**22 in magnitude; adding 1.5 * 2**23 rounds in the last place."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _load(base, head, dim, HEADS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """float32 [heads, COUNT padded] values of each head from `base` on, STEP apart."""
    if COUNT == 0:
        return tl.zeros([head.shape[0], dim.shape[0]], dtype=tl.float32)
    else:
        mask = (head < HEADS)[:, None] & (dim < COUNT)[None, :]
        return tl.load(base + head[:, None] * SIZE + dim[None, :] * STEP, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm(a, b, rest, weight_ptr, dim, tail, eps, SIZE: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr,
          SECOND: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """RMS norm of every head of [heads, ...] tiles."""
    square = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1) + tl.sum(rest * rest, axis=1)
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, SIZE * 1.0) + eps))
    if HALF > 0:
        a = a * factor[:, None] * tl.load(weight_ptr + dim * STEP, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
        weight = tl.load(weight_ptr + SECOND + dim * STEP, mask=dim < HALF, other=0.0).to(tl.float32)
        b = b * factor[:, None] * weight[None, :]
    if REST > 0:
        weight = tl.load(weight_ptr + 2 * HALF + tail, mask=tail < REST, other=0.0).to(tl.float32)
        rest = rest * factor[:, None] * weight[None, :]
    return a, b, rest


@triton.jit
def _quantise(x, scale, zero):
    """int8 of [heads, ...] values: round(x / scale + zero), ties to even, saturated."""
    x = tl.div_rn(x, scale[:, None] + x * 0.0) + zero[:, None]
    x = tl.where(x < -128.0, -128.0, tl.where(x > 127.0, 127.0, x))
    return round_half_even(x)


@triton.jit
def _scale_of(amax):
    """Largest magnitude / 127; 1 where all is 0."""
    return tl.where(amax == 0.0, 1.0, tl.div_rn(amax, 127.0 + amax * 0.0))


@triton.jit
def rope_and_cache_kernel(
    q_out_ptr,
    qkv_ptr,
    v_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_zero_ptr,
    v_zero_ptr,
    k_scales_out_ptr,
    v_scales_out_ptr,
    eps,
    tokens,
    rows,
    slots,
    k_block_stride,
    v_block_stride,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    K_HEAD: tl.constexpr,
    K_SLOT: tl.constexpr,
    K_DIM: tl.constexpr,
    V_HEAD: tl.constexpr,
    V_SLOT: tl.constexpr,
    QUANTISED: tl.constexpr,
    ROW: tl.constexpr,
    V_ROW: tl.constexpr,
):
    """Programs walk the tokens, each from its own on.

    q_out: [tokens, HEADS, SIZE]. qkv: [tokens, ROW elements apart], queries (unless HEADS is 0), then keys. v:
    [tokens, V_ROW elements apart]. cos_sin: [rows, 2 * HALF]; None if HALF is 0. positions, slots: [tokens] int32 below
    `rows` and `slots`; positions may be None. Caches: see `paged_attention_kernel.py`. scale, zero: [KV_HEADS] float32;
    scales_out: [blocks, KV_HEADS, BLOCK] float32, written instead.
    """
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    SECOND: tl.constexpr = 1 if INTERLEAVED else HALF
    head, kv = tl.arange(0, HEADS_PAD), tl.arange(0, KV_PAD)
    dim, tail, dim_v = tl.arange(0, HALF_PAD), tl.arange(0, REST_PAD), tl.arange(0, V_PAD)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        cos = tl.zeros([1, HALF_PAD], dtype=tl.float32)
        sin = cos
        if HALF > 0:
            row = token
            if positions_ptr is not None:
                row = tl.load(positions_ptr + token)
                row = tl.where((row >= 0) & (row < rows), row, 0)
            angles = cos_sin_ptr + row * (2 * HALF)
            cos = tl.load(angles + dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
            sin = tl.load(angles + HALF + dim, mask=dim < HALF, other=0.0).to(tl.float32)[None, :]
        if HEADS > 0:
            q_base = qkv_ptr + token * ROW
            a = _load(q_base, head, dim, HEADS, SIZE, STEP, HALF)
            b = _load(q_base + SECOND, head, dim, HEADS, SIZE, STEP, HALF)
            rest = _load(q_base + 2 * HALF, head, tail, HEADS, SIZE, 1, REST)
            if q_norm_ptr is not None:
                a, b, rest = _norm(a, b, rest, q_norm_ptr, dim, tail, eps, SIZE, HALF, STEP, SECOND, REST)
            out = q_out_ptr + token * (HEADS * SIZE)
            at = head[:, None] * SIZE + dim[None, :] * STEP
            mask = (head < HEADS)[:, None] & (dim < HALF)[None, :]
            kind = q_out_ptr.dtype.element_ty
            if HALF > 0:
                tl.store(out + at, (a * cos - b * sin).to(kind), mask=mask)
                tl.store(out + SECOND + at, (b * cos + a * sin).to(kind), mask=mask)
            if REST > 0:
                rest_mask = (head < HEADS)[:, None] & (tail < REST)[None, :]
                tl.store(out + 2 * HALF + head[:, None] * SIZE + tail[None, :], rest.to(kind), mask=rest_mask)

        slot = tl.load(slots_ptr + token)
        # A slot beyond the cache is not written; addresses are validated, whatever the branch.
        slot = tl.where(slot < slots, slot, -1)
        if slot >= 0:
            block, place = slot // BLOCK, slot % BLOCK
            k_base = qkv_ptr + token * ROW + HEADS * SIZE
            ka = _load(k_base, kv, dim, KV_HEADS, SIZE, STEP, HALF)
            kb = _load(k_base + SECOND, kv, dim, KV_HEADS, SIZE, STEP, HALF)
            k_rest = _load(k_base + 2 * HALF, kv, tail, KV_HEADS, SIZE, 1, REST)
            if k_norm_ptr is not None:
                ka, kb, k_rest = _norm(ka, kb, k_rest, k_norm_ptr, dim, tail, eps, SIZE, HALF, STEP, SECOND, REST)
            first, second = ka * cos - kb * sin, kb * cos + ka * sin
            v = _load(v_ptr + token * V_ROW, kv, dim_v, KV_HEADS, V_SIZE, 1, V_SIZE)
            if QUANTISED:
                if k_scales_out_ptr is not None:
                    amax = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
                    k_scale = _scale_of(tl.maximum(amax, tl.max(tl.abs(k_rest), axis=1)))
                    scales = k_scales_out_ptr + block * (KV_HEADS * BLOCK) + place
                    tl.store(scales + kv * BLOCK, k_scale, mask=kv < KV_HEADS)
                else:
                    k_scale = tl.load(k_scale_ptr + kv, mask=kv < KV_HEADS, other=1.0)
                if v_scales_out_ptr is not None:
                    v_scale = _scale_of(tl.max(tl.abs(v), axis=1))
                    scales = v_scales_out_ptr + block * (KV_HEADS * BLOCK) + place
                    tl.store(scales + kv * BLOCK, v_scale, mask=kv < KV_HEADS)
                else:
                    v_scale = tl.load(v_scale_ptr + kv, mask=kv < KV_HEADS, other=1.0)
                k_zero, v_zero = k_scale * 0.0, v_scale * 0.0
                if k_zero_ptr is not None:
                    k_zero = tl.load(k_zero_ptr + kv, mask=kv < KV_HEADS, other=0.0)
                if v_zero_ptr is not None:
                    v_zero = tl.load(v_zero_ptr + kv, mask=kv < KV_HEADS, other=0.0)
                first, second = _quantise(first, k_scale, k_zero), _quantise(second, k_scale, k_zero)
                k_rest, v = _quantise(k_rest, k_scale, k_zero), _quantise(v, v_scale, v_zero)
            cached = k_cache_ptr.dtype.element_ty
            k_out = k_cache_ptr + block * k_block_stride + place * K_SLOT
            k_at = kv[:, None] * K_HEAD + dim[None, :] * (STEP * K_DIM)
            k_mask = (kv < KV_HEADS)[:, None] & (dim < HALF)[None, :]
            if HALF > 0:
                tl.store(k_out + k_at, first.to(cached), mask=k_mask)
                tl.store(k_out + SECOND * K_DIM + k_at, second.to(cached), mask=k_mask)
            if REST > 0:
                k_rest_mask = (kv < KV_HEADS)[:, None] & (tail < REST)[None, :]
                rest_at = 2 * HALF * K_DIM + kv[:, None] * K_HEAD + tail[None, :] * K_DIM
                tl.store(k_out + rest_at, k_rest.to(cached), mask=k_rest_mask)
            v_out = v_cache_ptr + block * v_block_stride + place * V_SLOT
            v_mask = (kv < KV_HEADS)[:, None] & (dim_v < V_SIZE)[None, :]
            tl.store(v_out + kv[:, None] * V_HEAD + dim_v[None, :], v.to(cached), mask=v_mask)


def _specimens():
    """Llama-3 8B's: NeoX pairs into a bfloat16 cache; a partial, interleaved rotation with norms into an int8 one."""
    names = rope_and_cache_kernel.arg_names
    signature = dict.fromkeys(("q_out_ptr", "qkv_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16")
    signature |= {"cos_sin_ptr": "*fp32", "positions_ptr": "*i32", "slots_ptr": "*i32", "eps": "fp32"}
    signature |= dict.fromkeys(("tokens", "rows", "slots", "k_block_stride", "v_block_stride"), "i32")
    shape = {"HEADS": 32, "HEADS_PAD": 32, "KV_HEADS": 8, "KV_PAD": 8, "SIZE": 128, "V_SIZE": 128, "V_PAD": 128,
             "HALF": 64, "HALF_PAD": 64, "REST": 0, "REST_PAD": 1, "INTERLEAVED": False, "BLOCK": 64, "K_HEAD": 8192,
             "K_SLOT": 1, "K_DIM": 64, "V_HEAD": 8192, "V_SLOT": 128, "QUANTISED": False, "ROW": 6144,
             "V_ROW": 6144}  # fmt: skip
    eight = dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "*i8") | dict.fromkeys(("q_norm_ptr", "k_norm_ptr"), "*bf16")
    per_head = dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "k_zero_ptr", "v_zero_ptr"), "*fp32")
    per_token = dict.fromkeys(("k_scales_out_ptr", "v_scales_out_ptr"), "*fp32")
    partial = {"HALF": 32, "HALF_PAD": 32, "REST": 64, "REST_PAD": 64, "QUANTISED": True}
    for label, given, constants in (
        ("partial, norms, int8 per token", eight | per_token, partial),
        ("neox", {}, {}),
        ("interleaved, int8 per head", eight | per_head, partial | {"INTERLEAVED": True}),
        ("write only", {}, {"HEADS": 0, "HEADS_PAD": 1, "HALF": 0, "HALF_PAD": 1, "REST": 128, "REST_PAD": 128}),
    ):
        kinds = signature | given
        absent = {name: None for name in names if name not in kinds and name not in shape}
        yield {"kernel": rope_and_cache_kernel, "signature": kinds, "constexprs": shape | absent | constants,
               "grid": (24,), "num_warps": 1, "num_stages": 3, "name": f"rope_and_cache {label}",
               "values": {"tokens": 2048}}  # fmt: skip


LEGALITY_SPECIMENS = list(_specimens())
EXACT = True  # a value times its angle is rounded before the sum, as in the meaning
