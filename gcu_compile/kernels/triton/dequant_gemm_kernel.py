"""x @ dequantise(weight).T + bias with 4- or 8-bit codes, of one weight or of a mixture of experts'.

Codes minus their midpoint are whole numbers that every activation dtype holds exactly, so that products enter the
tensor unit without a rounding; scale and zero point are applied to each group's partial sum, in float32. Words lie
[K / codes per word, N] on the cards, which is GPTQ's form: a word tile loads as it lies, and unpacking is a shift per
code along a third dimension. With act-order every input has a group of its own: its scales are then gathered.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import segments


@triton.jit
def unpack(words, BITS: tl.constexpr, PER_WORD: tl.constexpr, SIGNED: tl.constexpr, MIDPOINT: tl.constexpr):
    """[rows * PER_WORD, columns] int32 codes minus MIDPOINT, of words [rows, columns]; neighbours run along rows."""
    codes = words.to(tl.int32)
    if PER_WORD > 1:
        shifts = tl.arange(0, PER_WORD) * BITS
        codes = tl.reshape(codes[:, None, :] >> shifts[None, :, None], [words.shape[0] * PER_WORD, words.shape[1]])
    if PER_WORD > 1 or not SIGNED:
        codes = codes & ((1 << BITS) - 1)
        if SIGNED:
            codes = (codes ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    return codes - MIDPOINT


@triton.jit
def dequant_gemm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    g_idx_ptr,
    bias_ptr,
    offsets_ptr,
    rows,
    n,
    k,
    runs,
    groups,
    experts,
    blocks_m,
    x_stride,
    weight_expert,
    K_STRIDE: tl.constexpr,
    N_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PER_WORD: tl.constexpr,
    SIGNED: tl.constexpr,
    MIDPOINT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Programs: (blocks_m blocks of rows, innermost, x blocks of outputs) x splits of the inputs.

    out: [rows, n], or [SPLITS, rows, n] float32 to be summed. x: [rows, k], rows x_stride apart. weight: words of
    PER_WORD codes along k, K_STRIDE and N_STRIDE apart; an expert's are weight_expert apart. scales, zeros: [groups,
    n] per expert; zeros in the codes' range or None. g_idx: [k] int32 or None. bias: [n] or None. offsets: [experts +
    1] int32, the experts' rows, or None. GROUP: inputs of a run; there are `runs` of them, each with its scales, or a
    single one with act-order.
    """
    block_m, block_n, split = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m, tl.program_id(1)
    row = block_m * BLOCK_M
    end = rows
    if offsets_ptr is not None:
        expert, begin, end, nth = segments.find(offsets_ptr, experts, block_m, BLOCK_M, EXPERTS)
        row = begin + nth * BLOCK_M
        weight_ptr += expert * weight_expert
        scales_ptr += expert * groups * n
        if zeros_ptr is not None:
            zeros_ptr += expert * groups * n
        if bias_ptr is not None:
            bias_ptr += expert * n
        if g_idx_ptr is not None:
            g_idx_ptr += expert * k
    if row < end:
        WORDS: tl.constexpr = BLOCK_K // PER_WORD
        m, column, kk = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        word = tl.arange(0, WORDS)
        first_n = block_n * BLOCK_N
        columns = column < n - first_n
        in_rows = m < end - row
        kind = x_ptr.dtype.element_ty
        x_base = x_ptr + row * x_stride
        # On the cards outputs are a word tile's contiguous dimension.
        weight_base = weight_ptr + first_n * N_STRIDE
        words = (k + PER_WORD - 1) // PER_WORD
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        share = (runs + SPLITS - 1) // SPLITS
        first = split * share
        last = tl.minimum(first + share, runs)
        for group in range(first, last):
            part = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            x_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            begin_k = group * GROUP
            end_k = tl.minimum(begin_k + GROUP, k)
            for at in range(begin_k, end_k, BLOCK_K):
                x_mask = in_rows[:, None] & (kk < end_k - at)[None, :]
                x = tl.load(x_base + at + m[:, None] * x_stride + kk[None, :], mask=x_mask, other=0.0)
                at_word = at // PER_WORD
                w = tl.load(
                    weight_base + at_word * K_STRIDE + word[:, None] * K_STRIDE + column[None, :] * N_STRIDE,
                    mask=(word < words - at_word)[:, None] & columns[None, :],
                    other=0,
                )
                codes = unpack(w, BITS, PER_WORD, SIGNED, MIDPOINT)
                if g_idx_ptr is None:
                    part = tl.dot(x, codes.to(kind), part, input_precision="ieee")
                    if zeros_ptr is not None:
                        x_sum += tl.sum(x.to(tl.float32), axis=1)
                else:
                    own = tl.load(g_idx_ptr + at + kk, mask=kk < end_k - at, other=0)
                    own = tl.where((own >= 0) & (own < groups), own, 0)
                    numbers = codes.to(tl.float32)
                    table = own[:, None] * n + (first_n + column)[None, :]
                    mask = columns[None, :] & (kk < end_k - at)[:, None]
                    if zeros_ptr is not None:
                        zero = tl.load(zeros_ptr + table, mask=mask, other=0).to(tl.float32)
                        numbers -= zero - MIDPOINT
                    numbers *= tl.load(scales_ptr + table, mask=mask, other=0.0).to(tl.float32)
                    acc = tl.dot(x, numbers.to(kind), acc, input_precision="ieee")
            if g_idx_ptr is None:
                scale_at = group * n + first_n
                scale = tl.load(scales_ptr + scale_at + column, mask=columns, other=0.0).to(tl.float32)
                if zeros_ptr is not None:
                    zero = tl.load(zeros_ptr + scale_at + column, mask=columns, other=0).to(tl.float32) - MIDPOINT
                    part -= x_sum[:, None] * zero[None, :]
                acc += part * scale[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + first_n + column, mask=columns, other=0.0).to(tl.float32)
            acc += tl.where(split == 0, bias, 0.0)[None, :]
        out_base = out_ptr + (split * rows + row) * n + first_n
        tl.store(
            out_base + m[:, None] * n + column[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=in_rows[:, None] & columns[None, :],
        )


def _specimens():
    """A linear of 4096 x 4096 in groups of 128: decode, prefill, 8 bits per channel, experts, act-order."""
    names = dequant_gemm_kernel.arg_names
    signature = {"out_ptr": "*bf16", "x_ptr": "*bf16", "weight_ptr": "*i32", "scales_ptr": "*bf16"}
    sizes = ("rows", "n", "k", "runs", "groups", "experts", "blocks_m", "x_stride", "weight_expert")
    signature |= dict.fromkeys(sizes, "i32")
    shape = {"K_STRIDE": 4096, "N_STRIDE": 1, "GROUP": 128, "BITS": 4, "PER_WORD": 8, "SIGNED": False,
             "MIDPOINT": 8, "BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 128, "SPLITS": 1, "EXPERTS": 1}  # fmt: skip
    eight = {"BITS": 8, "PER_WORD": 1, "SIGNED": True, "MIDPOINT": 0, "GROUP": 4096}
    zeros = {"zeros_ptr": "*i32"}
    act_order = "act-order: each input names its group, so that a tile's scales and zero points are gathered"
    for label, given, constants, grid, gathers in (
        ("w4a16 decode", zeros | {"bias_ptr": "*bf16"}, {}, (32, 1), ""),
        ("w4a16 prefill", {}, {"BLOCK_M": 64}, (256, 1), ""),
        ("w8a16", {"weight_ptr": "*i8"}, eight, (32, 1), ""),
        ("w4a16 experts, split", {"offsets_ptr": "*i32", "out_ptr": "*fp32"}, {"SPLITS": 2, "EXPERTS": 64},
         (2560, 2), ""),
        ("w4a16 act-order", zeros | {"g_idx_ptr": "*i32"}, {}, (32, 1), act_order),
    ):  # fmt: skip
        kinds = signature | given
        absent = {name: None for name in names if name not in kinds and name not in shape}
        yield {"kernel": dequant_gemm_kernel, "signature": kinds, "constexprs": shape | absent | constants,
               "grid": grid, "num_warps": 1, "num_stages": 3, "name": f"dequant_gemm {label}",
               "values": {"rows": 16, "n": 4096, "k": 4096, "runs": 32, "blocks_m": 1}}  # fmt: skip
        if gathers:
            GATHERS[f"dequant_gemm {label}"] = gathers


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return constexprs | {"BLOCK_M": 16, "BLOCK_N": 64}


GATHERS = {}  # specimen -> why it gathers
LEGALITY_SPECIMENS = list(_specimens())
