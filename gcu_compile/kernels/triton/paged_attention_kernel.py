"""Attention over a paged KV cache: decode, chunked prefill and prefill of a mixed batch in one launch.

One program takes BLOCK_Q neighbouring queries of one sequence and all query heads of one KV head, as the BLOCK_Q *
GROUP rows of its products, and walks the sequence's blocks; blocks are found by scalars, so that every tile is one
slice. With splits, programs share a sequence's keys, and `merge_kernel` joins their results.

Keys lie [head_dim, block_size] inside a block on the cards (strides say so): q . k^T is then a product of two tiles
as they lie in memory, without a transposed load. On cuda any strides will do.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import segments, softmax

ENTRIES = tl.constexpr(64)  # of a block table, loaded at once


@triton.jit
def _of_head(ptr, head, slot, PER_TOKEN: tl.constexpr):
    """The scale or zero point of a cache head for every slot; nothing where each token has its own."""
    if PER_TOKEN or ptr is None:
        return slot.to(tl.float32)
    else:
        return tl.load(ptr + head).to(tl.float32) + slot.to(tl.float32) * 0.0


@triton.jit
def _of_block(ptr, of_head, base, slot, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """The scales or zero points of one block's slots, float32 [BLOCK_N]."""
    if PER_TOKEN:
        return tl.load(ptr + base + slot, mask=slot < BLOCK, other=0).to(tl.float32)
    else:
        return of_head


@triton.jit
def paged_attention_kernel(
    out_ptr,
    partial_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_zero_ptr,
    v_zero_ptr,
    alibi_ptr,
    sinks_ptr,
    scale,
    sequences,
    num_blocks,
    table_stride,
    k_block_stride,
    v_block_stride,
    scale_block_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_PAD: tl.constexpr,
    K_HEAD: tl.constexpr,
    K_SLOT: tl.constexpr,
    K_DIM: tl.constexpr,
    V_HEAD: tl.constexpr,
    V_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SPLITS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Programs: query blocks x KV heads x splits.

    out: [tokens, HEADS, DV], written if SPLITS is 1. partial: else [tokens, HEADS, SPLITS, DV + 2] float32: output,
    maximum and sum. q: [tokens, HEADS, D + TAIL] contiguous. k, v: blocks of BLOCK keys, strides as named. table:
    [sequences, ...] int32. k_scale ...: [KV heads] or, PER_TOKEN, [blocks, KV heads, BLOCK]; None for float caches.
    alibi, sinks: [HEADS] float32. A head of q and k may have TAIL values beyond D (the rotated part of a latent
    cache): D and TAIL are loaded as tiles of their own, so that neither is padded to the other's size.
    """
    kv_head, split = tl.program_id(1), tl.program_id(2)
    index, begin, end, block_q = segments.find(query_start_ptr, sequences, tl.program_id(0), BLOCK_Q, SEQUENCES)
    token = begin + block_q * BLOCK_Q
    if token < end:
        keys_in_all = tl.load(seq_lens_ptr + index)
        context = keys_in_all - (end - begin)  # keys before the sequence's first query
        M: tl.constexpr = BLOCK_Q * GROUP_PAD
        # Rows are (query, head of the group). As data they may be reshaped; as addresses they must stay apart.
        query = tl.arange(0, BLOCK_Q)
        member = tl.arange(0, GROUP_PAD)
        position = tl.reshape((query[:, None] + (member * 0)[None, :]), [M]) + (context + block_q * BLOCK_Q)
        dim = tl.arange(0, D_PAD)
        q_base = q_ptr + token * (HEADS * (D + TAIL)) + kv_head * (GROUP * (D + TAIL))
        rows = (query < end - token)[:, None] & (member < GROUP)[None, :]
        q_at = query[:, None] * (HEADS * (D + TAIL)) + member[None, :] * (D + TAIL)
        q = tl.load(
            q_base + q_at[:, :, None] + dim[None, None, :], mask=rows[:, :, None] & (dim < D)[None, None, :], other=0.0
        )
        q = tl.reshape(q, [M, D_PAD])
        if TAIL > 0:
            tail = tl.arange(0, TAIL_PAD)
            q_tail = tl.load(
                q_base + D + q_at[:, :, None] + tail[None, None, :],
                mask=rows[:, :, None] & (tail < TAIL)[None, None, :],
                other=0.0,
            )
            q_tail = tl.reshape(q_tail, [M, TAIL_PAD])
        if alibi_ptr is not None:
            slopes = tl.load(alibi_ptr + kv_head * GROUP + member, mask=member < GROUP, other=0.0)
            slopes = tl.reshape((query * 0)[:, None] + slopes[None, :], [M])
        zero_rows = tl.zeros([M], dtype=tl.float32)
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + kv_head * GROUP + member, mask=member < GROUP, other=0.0)
            sinks = tl.reshape((query * 0)[:, None] + sinks[None, :], [M])
            maximum, total = softmax.start(sinks, zero_rows, split == 0)
        else:
            maximum, total = softmax.start(zero_rows, zero_rows, split < 0)
        if k_zero_ptr is not None:
            q_sum = tl.sum(q.to(tl.float32), axis=1)
            if TAIL > 0:
                q_sum += tl.sum(q_tail.to(tl.float32), axis=1)

        # The blocks that a query of this program sees, and this split's share of them.
        last_key = keys_in_all
        if CAUSAL:
            last_key = tl.minimum(keys_in_all, context + block_q * BLOCK_Q + BLOCK_Q)
        first_block = 0
        if WINDOW > 0:
            first_block = tl.maximum(context + block_q * BLOCK_Q - WINDOW + 1, 0) // BLOCK
        blocks = (last_key + BLOCK - 1) // BLOCK - first_block
        share = (blocks + SPLITS - 1) // SPLITS
        first = first_block + split * share
        final = tl.minimum(first + share, first_block + blocks)

        slot = tl.arange(0, BLOCK_N)
        dim_v = tl.arange(0, DV_PAD)
        k_at = dim[:, None] * K_DIM + slot[None, :] * K_SLOT
        k_mask = (dim < D)[:, None] & (slot < BLOCK)[None, :]
        v_at = slot[:, None] * V_SLOT + dim_v[None, :]
        k_scale_head = _of_head(k_scale_ptr, kv_head, slot, PER_TOKEN)
        v_scale_head = _of_head(v_scale_ptr, kv_head, slot, PER_TOKEN)
        k_zero_head = _of_head(k_zero_ptr, kv_head, slot, PER_TOKEN)
        v_zero_head = _of_head(v_zero_ptr, kv_head, slot, PER_TOKEN)
        acc = tl.zeros([M, DV_PAD], dtype=tl.float32)
        offset = tl.zeros([M], dtype=tl.float32)  # of zero points of values
        entry = tl.arange(0, ENTRIES)
        for group in range(first, final, ENTRIES):
            here = tl.minimum(final - group, ENTRIES)
            table = tl.load(table_ptr + index * table_stride + group + entry, mask=entry < here, other=0)
            for j in range(0, here):
                block = tl.sum(tl.where(entry == j, table, 0), axis=0)
                # Addresses are validated before masks, and a bad table must not read beyond the cache.
                block = tl.where((block >= 0) & (block < num_blocks), block, 0)
                key = (group + j) * BLOCK + slot
                k_base = k_ptr + block * k_block_stride + kv_head * K_HEAD
                k = tl.load(k_base + k_at, mask=k_mask, other=0.0)
                scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
                if TAIL > 0:
                    k_tail = tl.load(
                        k_base + D * K_DIM + tail[:, None] * K_DIM + slot[None, :] * K_SLOT,
                        mask=(tail < TAIL)[:, None] & (slot < BLOCK)[None, :],
                        other=0.0,
                    )
                    scores += tl.dot(q_tail, k_tail.to(q.dtype), input_precision="ieee")
                scale_base = block * scale_block_stride + kv_head * BLOCK
                if k_scale_ptr is not None:
                    if k_zero_ptr is not None:
                        k_zero = _of_block(k_zero_ptr, k_zero_head, scale_base, slot, PER_TOKEN, BLOCK)
                        scores -= q_sum[:, None] * k_zero[None, :]
                    k_scale = _of_block(k_scale_ptr, k_scale_head, scale_base, slot, PER_TOKEN, BLOCK)
                    scores *= k_scale[None, :]
                scores = softmax.capped(scores * scale, SOFT_CAP)
                if alibi_ptr is not None:
                    scores += slopes[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
                seen = softmax.visible(position, key, keys_in_all, CAUSAL, WINDOW) & (slot < BLOCK)[None, :]
                scores = tl.where(seen, scores, float("-inf"))
                weights, factor, maximum, total = softmax.step(scores, maximum, total)
                acc *= factor[:, None]
                if v_scale_ptr is not None:
                    v_scale = _of_block(v_scale_ptr, v_scale_head, scale_base, slot, PER_TOKEN, BLOCK)
                    weights *= v_scale[None, :]
                if v_zero_ptr is not None:
                    v_zero = _of_block(v_zero_ptr, v_zero_head, scale_base, slot, PER_TOKEN, BLOCK)
                    offset = offset * factor + tl.sum(weights * v_zero[None, :], axis=1)
                v_base = v_ptr + block * v_block_stride + kv_head * V_HEAD
                # Keys beyond the sequence have weight 0, but what lies there may be NaN.
                left = keys_in_all - (group + j) * BLOCK
                v_mask = ((slot < left) & (slot < BLOCK))[:, None] & (dim_v < DV)[None, :]
                v = tl.load(v_base + v_at, mask=v_mask, other=0.0)
                acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
        if v_zero_ptr is not None:
            acc -= offset[:, None]
        if SPLITS == 1:
            result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            out_base = out_ptr + token * (HEADS * DV) + kv_head * (GROUP * DV)
            out_at = query[:, None] * (HEADS * DV) + member[None, :] * DV
            tl.store(
                out_base + out_at[:, :, None] + dim_v[None, None, :],
                tl.reshape(result, [BLOCK_Q, GROUP_PAD, DV_PAD]).to(out_ptr.dtype.element_ty),
                mask=rows[:, :, None] & (dim_v < DV)[None, None, :],
            )
        else:
            ROW: tl.constexpr = SPLITS * (DV + 2)
            part = partial_ptr + (token * HEADS + kv_head * GROUP) * ROW + split * (DV + 2)
            part_at = query[:, None] * (HEADS * ROW) + member[None, :] * ROW
            tl.store(
                part + part_at[:, :, None] + dim_v[None, None, :],
                tl.reshape(acc, [BLOCK_Q, GROUP_PAD, DV_PAD]),
                mask=rows[:, :, None] & (dim_v < DV)[None, None, :],
            )
            tl.store(part + DV + part_at, tl.reshape(maximum, [BLOCK_Q, GROUP_PAD]), mask=rows)
            tl.store(part + DV + 1 + part_at, tl.reshape(total, [BLOCK_Q, GROUP_PAD]), mask=rows)


@triton.jit
def merge_kernel(
    out_ptr, partial_ptr, rows, DV: tl.constexpr, DV_PAD: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr
):
    """One program per (token, head): joins the splits' outputs. partial: [rows, SPLITS, DV + 2]; out: [rows, DV]."""
    row = tl.program_id(0)
    split, dim = tl.arange(0, SPLITS_PAD), tl.arange(0, DV_PAD)
    base = partial_ptr + row * (SPLITS * (DV + 2))
    there = split < SPLITS
    maximum = tl.load(base + DV + split * (DV + 2), mask=there, other=float("-inf"))
    total = tl.load(base + DV + 1 + split * (DV + 2), mask=there, other=0.0)
    largest = tl.max(maximum, axis=0)
    factor = tl.exp(maximum - tl.where(largest == float("-inf"), 0.0, largest))
    parts = tl.load(
        base + split[:, None] * (DV + 2) + dim[None, :], mask=there[:, None] & (dim < DV)[None, :], other=0.0
    )
    whole = tl.sum(total * factor, axis=0)
    result = tl.sum(parts * factor[:, None], axis=0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(out_ptr + row * DV + dim, result.to(out_ptr.dtype.element_ty), mask=dim < DV)


def _specimens():
    """Llama-3 8B: 32 query and 8 KV heads of 128, blocks of 64; prefill, decode, int8 KV."""
    signature = {"out_ptr": "*bf16", "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "table_ptr": "*i32",
                 "query_start_ptr": "*i32", "seq_lens_ptr": "*i32", "scale": "fp32"}  # fmt: skip
    sizes = ("sequences", "num_blocks", "table_stride", "k_block_stride", "v_block_stride", "scale_block_stride")
    signature |= dict.fromkeys(sizes, "i32")
    optional = ("partial_ptr", "k_scale_ptr", "v_scale_ptr", "k_zero_ptr", "v_zero_ptr", "alibi_ptr", "sinks_ptr")
    shape = {"HEADS": 32, "GROUP": 4, "GROUP_PAD": 4, "D": 128, "D_PAD": 128, "DV": 128, "DV_PAD": 128, "TAIL": 0,
             "TAIL_PAD": 16, "K_HEAD": 8192, "K_SLOT": 1, "K_DIM": 64, "V_HEAD": 8192, "V_SLOT": 128, "BLOCK": 64,
             "BLOCK_N": 64, "BLOCK_Q": 16, "SEQUENCES": 8, "SPLITS": 1, "PER_TOKEN": False, "CAUSAL": True,
             "WINDOW": 0, "SOFT_CAP": 0.0}  # fmt: skip
    eight = dict.fromkeys(("k_ptr", "v_ptr"), "*i8") | dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "*fp32")
    zeros = dict.fromkeys(("k_zero_ptr", "v_zero_ptr"), "*i32")
    split = {"partial_ptr": "*fp32"}
    decode = {"BLOCK_Q": 8, "SPLITS": 4}
    everything = eight | zeros | split | dict.fromkeys(("alibi_ptr", "sinks_ptr"), "*fp32")
    rare = {"PER_TOKEN": True, "WINDOW": 4096, "SOFT_CAP": 50.0}
    for label, given, constants, grid in (
        ("int8 decode, all", everything, decode | rare, (16, 8, 4)),
        ("prefill", {}, {}, (136, 8, 1)),
        ("decode", split, decode, (16, 8, 4)),
        ("int8 decode", eight | split, decode, (16, 8, 4)),
    ):
        kinds = signature | given
        absent = {name: None for name in optional if name not in kinds}
        yield {"kernel": paged_attention_kernel, "signature": kinds, "constexprs": shape | absent | constants,
               "grid": grid, "num_warps": 1, "num_stages": 3, "name": f"paged_attention {label}"}  # fmt: skip
    yield {"kernel": merge_kernel, "signature": {"out_ptr": "*bf16", "partial_ptr": "*fp32", "rows": "i32"},
           "constexprs": {"DV": 128, "DV_PAD": 128, "SPLITS": 4, "SPLITS_PAD": 4}, "grid": (256,), "num_warps": 1,
           "num_stages": 3, "name": "paged_attention merge"}  # fmt: skip


LEGALITY_SPECIMENS = list(_specimens())
# DeepSeek-V2-Lite's absorbed decode: 16 heads share a latent of 512 + 64, read both as keys and as values. One of the
# two is a transposed tile, which gcu300 gets wrong: there the keys are a copy with block_size innermost
# (`paged_attention.run_mla`).
_latent = {"HEADS": 16, "GROUP": 16, "GROUP_PAD": 16, "D": 512, "D_PAD": 512, "DV": 512, "DV_PAD": 512, "TAIL": 64,
           "TAIL_PAD": 64, "K_HEAD": 36864, "K_SLOT": 576, "K_DIM": 1, "V_HEAD": 36864, "V_SLOT": 576,
           "BLOCK_Q": 2}  # fmt: skip
_copied = {"K_SLOT": 1, "K_DIM": 64, "V_HEAD": 32768, "V_SLOT": 512}
_decode = next(entry for entry in LEGALITY_SPECIMENS if entry["name"] == "paged_attention decode")
LEGALITY_SPECIMENS.append(
    _decode | {"name": "mla_attention decode, copied keys", "constexprs": _decode["constexprs"] | _latent | _copied}
)
NOT_ON_GCU300 = [
    _decode | {"name": "mla_attention decode", "num_warps": 2, "constexprs": _decode["constexprs"] | _latent}
]
