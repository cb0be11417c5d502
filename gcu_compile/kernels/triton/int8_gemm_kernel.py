"""W8A8: integer products of int8 codes, summed exactly, then scaled; of one weight or of a mixture of experts'.

    sum (x - xz) * (w - wz) = sum x w - xz sum w - wz sum x + k xz wz

so that the tensor unit multiplies the stored codes, whatever the zero points. Weights lie [K, N] on the cards.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import segments


@triton.jit
def int8_gemm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scales_ptr,
    x_scales_ptr,
    x_zeros_ptr,
    zeros_ptr,
    bias_ptr,
    offsets_ptr,
    rows,
    n,
    k,
    experts,
    blocks_m,
    x_stride,
    weight_expert,
    K_STRIDE: tl.constexpr,
    N_STRIDE: tl.constexpr,
    UNSIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Programs: blocks_m blocks of rows, innermost, x blocks of outputs.

    out: [rows, n]. x: [rows, k] int8. weight: [k, n] int8 by strides; UNSIGNED: bytes that hold 0 .. 255, taken as
    code - 128. scales: [n], x_scales: [rows] float32. x_zeros: [rows], zeros: [n] int32 on the same terms, or None.
    bias: [n] or None. offsets: [experts + 1] int32 or None; then weights, scales, zeros and biases are per expert.
    """
    block_m, block_n = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    row = block_m * BLOCK_M
    end = rows
    if offsets_ptr is not None:
        expert, begin, end, nth = segments.find(offsets_ptr, experts, block_m, BLOCK_M, EXPERTS)
        row = begin + nth * BLOCK_M
        weight_ptr += expert * weight_expert
        scales_ptr += expert * n
        if zeros_ptr is not None:
            zeros_ptr += expert * n
        if bias_ptr is not None:
            bias_ptr += expert * n
    if row < end:
        m, column, kk = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        first_n = block_n * BLOCK_N
        columns, in_rows = column < n - first_n, m < end - row
        x_base, weight_base = x_ptr + row * x_stride, weight_ptr + first_n * N_STRIDE
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
        x_sum = tl.zeros([BLOCK_M], dtype=tl.int32)
        w_sum = tl.zeros([BLOCK_N], dtype=tl.int32)
        for at in range(0, k, BLOCK_K):
            x_mask = in_rows[:, None] & (kk < k - at)[None, :]
            x = tl.load(x_base + at + m[:, None] * x_stride + kk[None, :], mask=x_mask, other=0)
            w_at = weight_base + at * K_STRIDE + kk[:, None] * K_STRIDE + column[None, :] * N_STRIDE
            w_mask = (kk < k - at)[:, None] & columns[None, :]
            if UNSIGNED:
                w = (tl.load(w_at, mask=w_mask, other=-128).to(tl.int32) ^ -128).to(tl.int8)
            else:
                w = tl.load(w_at, mask=w_mask, other=0)
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
            if zeros_ptr is not None:
                x_sum += tl.sum(x.to(tl.int32), axis=1)
            if x_zeros_ptr is not None:
                w_sum += tl.sum(w.to(tl.int32), axis=0)
        if x_zeros_ptr is not None:
            x_zero = tl.load(x_zeros_ptr + row + m, mask=in_rows, other=0)
            acc -= x_zero[:, None] * w_sum[None, :]
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + first_n + column, mask=columns, other=0)
            acc -= x_sum[:, None] * zero[None, :]
            if x_zeros_ptr is not None:
                acc += (k * x_zero)[:, None] * zero[None, :]
        x_scale = tl.load(x_scales_ptr + row + m, mask=in_rows, other=0.0)
        scale = tl.load(scales_ptr + first_n + column, mask=columns, other=0.0)
        y = acc.to(tl.float32) * x_scale[:, None] * scale[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + first_n + column, mask=columns, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out_ptr + row * n + first_n + m[:, None] * n + column[None, :],
            y.to(out_ptr.dtype.element_ty),
            mask=in_rows[:, None] & columns[None, :],
        )


EXACT = True  # scales, then bias: each rounded, as in the meaning


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return constexprs | {"BLOCK_M": 64, "BLOCK_K": 128}


def _specimens():
    """A linear of 4096 x 4096: prefill with zero points, decode, experts without and with zero points."""
    names = int8_gemm_kernel.arg_names
    signature = {
        "out_ptr": "*bf16",
        "x_ptr": "*i8",
        "weight_ptr": "*i8",
        "scales_ptr": "*fp32",
        "x_scales_ptr": "*fp32",
    }
    signature |= dict.fromkeys(("rows", "n", "k", "experts", "blocks_m", "x_stride", "weight_expert"), "i32")
    shape = {"K_STRIDE": 4096, "N_STRIDE": 1, "UNSIGNED": False, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 256,
             "EXPERTS": 1}  # fmt: skip
    zeros = {"x_zeros_ptr": "*i32", "zeros_ptr": "*i32", "bias_ptr": "*bf16"}
    for label, given, constants, grid in (
        ("zero points", zeros, {"UNSIGNED": True}, (256,)),
        ("decode", {}, {"BLOCK_M": 32}, (32,)),
        ("experts", {"offsets_ptr": "*i32"}, {"BLOCK_M": 32, "EXPERTS": 64}, (2560,)),
        ("experts, zero points", zeros | {"offsets_ptr": "*i32"}, {"BLOCK_M": 32, "EXPERTS": 64}, (2560,)),
    ):
        kinds = signature | given
        absent = {name: None for name in names if name not in kinds and name not in shape}
        yield {"kernel": int8_gemm_kernel, "signature": kinds, "constexprs": shape | absent | constants,
               "grid": grid, "num_warps": 1, "num_stages": 3, "name": f"int8_gemm {label}",
               "values": {"rows": 512, "n": 4096, "k": 4096, "x_stride": 4096, "blocks_m": 8}}  # fmt: skip


LEGALITY_SPECIMENS = list(_specimens())
