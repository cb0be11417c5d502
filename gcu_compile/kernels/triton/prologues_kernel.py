"""What runs before an int8 product: norm or activation, and int8 codes with a scale per row, without a trip to memory
in between. Rows that fit one tile are read once; longer ones are read again for each pass."""

import triton
import triton.language as tl

from gcu_compile.kernels.triton.quantize_per_token_kernel import codes_of


@triton.jit
def _sum_at(x_ptr, residual_ptr, x_at, residual_at, mask):
    """float32 x + residual."""
    total = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def rms_norm_quant_kernel(
    codes_ptr,
    scales_ptr,
    residual_out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    eps,
    rows,
    size,
    x_stride,
    residual_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Programs walk blocks of ROWS rows.

    codes: [rows, size] int8; scales: [rows] float32; residual_out: [rows, size] or None; x, residual: [rows, size],
    rows apart by their strides, or None for residual; weight: [size].
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        there = row < rows - first
        x_base, residual_base = x_ptr + first * x_stride, residual_ptr
        if residual_ptr is not None:
            residual_base += first * residual_stride
        square = tl.zeros([ROWS], dtype=tl.float32)
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, size, COLUMNS):
            mask = there[:, None] & (column < size - start)[None, :]
            x_at = start + row[:, None] * x_stride + column[None, :]
            total = _sum_at(x_base, residual_base, x_at, start + row[:, None] * residual_stride + column[None, :], mask)
            square += tl.sum(total * total, axis=1)
            if residual_ptr is not None:
                at = start + row[:, None] * size + column[None, :]
                kept = total.to(residual_out_ptr.dtype.element_ty)
                tl.store(residual_out_ptr + first * size + at, kept, mask=mask)
        factor = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, size * 1.0 + square * 0.0) + eps))
        amax = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, size, COLUMNS):
            inside = column < size - start
            if not ONE_TILE:
                x_at = start + row[:, None] * x_stride + column[None, :]
                residual_at = start + row[:, None] * residual_stride + column[None, :]
                total = _sum_at(x_base, residual_base, x_at, residual_at, there[:, None] & inside[None, :])
            weight = tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(tl.abs(total * factor[:, None] * weight[None, :]), axis=1))
        scale = tl.div_rn(amax, 127.0 + amax * 0.0)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        tl.store(scales_ptr + first + row, scale, mask=there)
        for start in range(0, size, COLUMNS):
            inside = column < size - start
            if not ONE_TILE:
                x_at = start + row[:, None] * x_stride + column[None, :]
                residual_at = start + row[:, None] * residual_stride + column[None, :]
                total = _sum_at(x_base, residual_base, x_at, residual_at, there[:, None] & inside[None, :])
            weight = tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
            codes = codes_of(total * factor[:, None] * weight[None, :], divisor, amax * 0.0)
            at = start + row[:, None] * size + column[None, :]
            tl.store(codes_ptr + first * size + at, codes, mask=there[:, None] & inside[None, :])


@triton.jit
def _gated_at(gate_ptr, up_ptr, at, mask):
    """float32 gate * sigmoid(gate) * up."""
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))
    return tl.div_rn(tl.where(gate > 0.0, gate, gate * small), 1.0 + small) * up


@triton.jit
def silu_mul_quant_kernel(
    codes_ptr,
    scales_ptr,
    gate_ptr,
    up_ptr,
    rows,
    size,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Programs walk blocks of ROWS rows.

    codes: [rows, size] int8; scales: [rows] float32; gate, up: [rows, size], rows `stride` apart.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        there = row < rows - first
        gate_base, up_base = gate_ptr + first * stride, up_ptr + first * stride
        amax = tl.zeros([ROWS], dtype=tl.float32)
        y = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, size, COLUMNS):
            mask = there[:, None] & (column < size - start)[None, :]
            y = _gated_at(gate_base, up_base, start + row[:, None] * stride + column[None, :], mask)
            amax = tl.maximum(amax, tl.max(tl.abs(y), axis=1))
        scale = tl.div_rn(amax, 127.0 + amax * 0.0)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        tl.store(scales_ptr + first + row, scale, mask=there)
        for start in range(0, size, COLUMNS):
            mask = there[:, None] & (column < size - start)[None, :]
            if not ONE_TILE:
                y = _gated_at(gate_base, up_base, start + row[:, None] * stride + column[None, :], mask)
            at = start + row[:, None] * size + column[None, :]
            tl.store(codes_ptr + first * size + at, codes_of(y, divisor, amax * 0.0), mask=mask)


EXACT = True  # the same arithmetic as the meaning's, but for the order of a sum and the exponential


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return constexprs | {"ROWS": 1, "COLUMNS": 4096}


def _specimens():
    norm = {"codes_ptr": "*i8", "scales_ptr": "*fp32", "residual_out_ptr": "*bf16", "x_ptr": "*bf16",
            "residual_ptr": "*bf16", "weight_ptr": "*bf16", "eps": "fp32", "rows": "i32", "size": "i32",
            "x_stride": "i32", "residual_stride": "i32"}  # fmt: skip
    gated = {"codes_ptr": "*i8", "scales_ptr": "*fp32", "gate_ptr": "*bf16", "up_ptr": "*bf16", "rows": "i32",
             "size": "i32", "stride": "i32"}  # fmt: skip
    alone = {name: kind for name, kind in norm.items() if name not in ("residual_out_ptr", "residual_ptr")}
    one, long = ({"ROWS": 2, "COLUMNS": 4096, "ONE_TILE": one_tile} for one_tile in (True, False))
    for label, kernel, signature, constants in (
        ("rms_norm_quant, 4096 values and a residual", rms_norm_quant_kernel, norm, one),
        ("rms_norm_quant, 4096 values", rms_norm_quant_kernel, alone,
         one | {"residual_out_ptr": None, "residual_ptr": None}),
        ("rms_norm_quant, 12288 values and a residual", rms_norm_quant_kernel, norm, long),
        ("silu_mul_quant, 11008 values", silu_mul_quant_kernel, gated, long),
        ("silu_mul_quant, 4096 values", silu_mul_quant_kernel, gated, one),
    ):  # fmt: skip
        yield {"kernel": kernel, "signature": signature, "constexprs": constants, "grid": (24,), "num_warps": 1,
               "num_stages": 3, "name": label}  # fmt: skip


LEGALITY_SPECIMENS = list(_specimens())
