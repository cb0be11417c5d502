"""Attention of contiguous tensors: bidirectional (vision encoders), causal and cross.

One program takes BLOCK_M queries of one head and walks the keys. Keys come as [batch, KV heads, head_dim, kv_len] on
the cards, so that q . k^T loads both tiles as they lie in memory; on cuda any strides will do.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import softmax


@triton.jit
def attention_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    alibi_ptr,
    sinks_ptr,
    scale,
    q_len,
    kv_len,
    causal_offset,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    bias_batch,
    bias_head,
    k_stride,
    bias_row,
    KEYS_INNERMOST: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BIAS_BOOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Programs: query blocks x heads x batch.

    q: [batch, HEADS, q_len, D], out: [batch, HEADS, q_len, DV], v: [batch, KV heads, kv_len, DV], rows contiguous.
    k: [batch, KV heads, kv_len, D] with rows of k_stride, or KEYS_INNERMOST its transpose.
    bias: a number or int8 (BIAS_BOOL: 0 hides) per key, and with BIAS_ROWS per query. alibi, sinks: [HEADS] float32.
    """
    block_m, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = block_m * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dim, dim_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    rows = row < q_len - first
    q_base = q_ptr + batch * q_batch + head * q_head + first * D
    q = tl.load(q_base + row[:, None] * D + dim[None, :], mask=rows[:, None] & (dim < D)[None, :], other=0.0)
    k_base = k_ptr + batch * k_batch + head // GROUP * k_head
    v_base = v_ptr + batch * v_batch + head // GROUP * v_head
    position = first + row + causal_offset

    zero = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sinks_ptr is not None:
        maximum, total = softmax.start(tl.load(sinks_ptr + head) + zero, zero, first >= 0)
    else:
        maximum, total = softmax.start(zero, zero, first < 0)
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + head)
    if bias_ptr is not None:
        bias_base = bias_ptr + batch * bias_batch + head * bias_head
        if BIAS_ROWS:
            bias_base += first * bias_row

    last = kv_len
    if CAUSAL:
        last = tl.minimum(kv_len, first + BLOCK_M + causal_offset)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first + causal_offset - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, DV_PAD], dtype=tl.float32)
    for start in range(begin, last, BLOCK_N):
        keys = column < kv_len - start
        if KEYS_INNERMOST:
            k_at = k_base + start + dim[:, None] * k_stride + column[None, :]
        else:
            k_at = k_base + start * k_stride + dim[:, None] + column[None, :] * k_stride
        k = tl.load(k_at, mask=(dim < D)[:, None] & keys[None, :], other=0.0)
        scores = softmax.capped(tl.dot(q, k, input_precision="ieee") * scale, SOFT_CAP)
        key = start + column
        if alibi_ptr is not None:
            scores += slope * (key[None, :] - position[:, None]).to(tl.float32)
        seen = softmax.visible(position, key, kv_len, CAUSAL, WINDOW)
        if bias_ptr is not None:
            if BIAS_ROWS:
                bias = tl.load(
                    bias_base + start + row[:, None] * bias_row + column[None, :],
                    mask=rows[:, None] & keys[None, :],
                    other=0,
                )
            else:
                bias = tl.load(bias_base + start + column, mask=keys, other=0)[None, :]
            if BIAS_BOOL:
                seen = seen & (bias != 0)
            else:
                scores += bias.to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))
        weights, factor, maximum, total = softmax.step(scores, maximum, total)
        v = tl.load(
            v_base + start * DV + column[:, None] * DV + dim_v[None, :],
            mask=keys[:, None] & (dim_v < DV)[None, :],
            other=0.0,
        )
        acc = tl.dot(weights.to(q.dtype), v, acc * factor[:, None], input_precision="ieee")
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_base = out_ptr + (batch * HEADS + head) * (q_len * DV) + first * DV
    tl.store(
        out_base + row[:, None] * DV + dim_v[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=rows[:, None] & (dim_v < DV)[None, :],
    )


def _specimens():
    """A vision encoder's heads of 80 with a bias, and a causal prefill of heads of 128."""
    signature = {"out_ptr": "*bf16", "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "scale": "fp32"}
    sizes = ("q_len", "kv_len", "causal_offset", "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head",
             "bias_batch", "bias_head", "k_stride", "bias_row")  # fmt: skip
    signature |= dict.fromkeys(sizes, "i32")
    shape = {"HEADS": 16, "GROUP": 1, "D": 80, "D_PAD": 128, "DV": 80, "DV_PAD": 128, "KEYS_INNERMOST": True,
             "BIAS_ROWS": True, "BIAS_BOOL": False, "BLOCK_M": 64, "BLOCK_N": 64, "CAUSAL": False, "WINDOW": 0,
             "SOFT_CAP": 0.0}  # fmt: skip
    optional = ("bias_ptr", "alibi_ptr", "sinks_ptr")
    full = {"D": 128, "DV": 128, "CAUSAL": True, "GROUP": 4}
    for label, given, constants in (
        ("encoder with bias", {"bias_ptr": "*bf16"}, {}),
        ("causal", {}, full),
        ("all", {"bias_ptr": "*i8", "alibi_ptr": "*fp32", "sinks_ptr": "*fp32"},
         full | {"BIAS_BOOL": True, "WINDOW": 1024, "SOFT_CAP": 30.0}),
    ):  # fmt: skip
        kinds = signature | given
        absent = {name: None for name in optional if name not in kinds}
        yield {"kernel": attention_kernel, "signature": kinds, "constexprs": shape | absent | constants,
               "grid": (32, 16, 1), "num_warps": 1, "num_stages": 3, "name": f"attention {label}",
               "values": {"kv_len": 2048, "q_len": 2048}}  # fmt: skip


LEGALITY_SPECIMENS = list(_specimens())
