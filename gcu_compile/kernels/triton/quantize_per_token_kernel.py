"""Rows of activations to int8, each with a scale (and a zero point) of its own."""

import triton
import triton.language as tl

from gcu_compile.kernels.triton.rope_and_cache_kernel import round_half_even


@triton.jit
def codes_of(x, scale, zero):
    """round(x / scale) + zero, saturated; ties to even."""
    whole = tl.div_rn(x, scale[:, None] + x * 0.0)
    # Beyond this every code saturates, and the rounding below needs small numbers.
    whole = tl.where(whole < -1024.0, -1024.0, tl.where(whole > 1024.0, 1024.0, whole))
    whole = round_half_even(whole) + zero[:, None]
    return tl.where(whole < -128.0, -128.0, tl.where(whole > 127.0, 127.0, whole)).to(tl.int8)


@triton.jit
def quantize_per_token_kernel(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    x_ptr,
    rows,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Programs walk blocks of ROWS rows.

    codes: [rows, size] int8; scales: [rows] float32, zeros: [rows] int32; x: [rows, size] contiguous. ONE_TILE: a row
    fits COLUMNS, and is read once instead of twice.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        there = row < rows - first
        base = x_ptr + first * size
        high = tl.zeros([ROWS], dtype=tl.float32)
        low = tl.zeros([ROWS], dtype=tl.float32)
        x = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, size, COLUMNS):
            mask = there[:, None] & (column < size - start)[None, :]
            x = tl.load(base + start + row[:, None] * size + column[None, :], mask=mask, other=0.0).to(tl.float32)
            high = tl.maximum(high, tl.max(x, axis=1))
            low = tl.minimum(low, tl.min(x, axis=1))
        if SYMMETRIC:
            scale = tl.div_rn(tl.maximum(high, -low), 127.0 + high * 0.0)
        else:
            scale = tl.div_rn(high - low, 255.0 + high * 0.0)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        zero = high * 0.0
        if not SYMMETRIC:
            zero = round_half_even(-128.0 - tl.div_rn(low, divisor))
            zero = tl.where(scale == 0.0, 0.0, zero)
        tl.store(scales_ptr + first + row, scale, mask=there)
        tl.store(zeros_ptr + first + row, zero.to(tl.int32), mask=there)
        out = codes_ptr + first * size
        if ONE_TILE:
            mask = there[:, None] & (column < size)[None, :]
            tl.store(out + row[:, None] * size + column[None, :], codes_of(x, divisor, zero), mask=mask)
        else:
            for start in range(0, size, COLUMNS):
                mask = there[:, None] & (column < size - start)[None, :]
                at = start + row[:, None] * size + column[None, :]
                x = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(out + at, codes_of(x, divisor, zero), mask=mask)


EXACT = True  # codes equal the meaning's


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return constexprs | ({"ROWS": 32} if constexprs["COLUMNS"] == 128 else {"ROWS": 1, "COLUMNS": 4096})


def _specimens():
    signature = {"codes_ptr": "*i8", "scales_ptr": "*fp32", "zeros_ptr": "*i32", "x_ptr": "*bf16", "rows": "i32",
                 "size": "i32"}  # fmt: skip
    for label, constants in (
        ("11008 values, zero points", {"ROWS": 4, "COLUMNS": 8192, "ONE_TILE": False, "SYMMETRIC": False}),
        ("4096 values", {"ROWS": 4, "COLUMNS": 4096, "ONE_TILE": True, "SYMMETRIC": True}),
        ("groups of 128", {"ROWS": 128, "COLUMNS": 128, "ONE_TILE": True, "SYMMETRIC": True}),
    ):
        yield {"kernel": quantize_per_token_kernel, "signature": signature, "constexprs": constants, "grid": (24,),
               "num_warps": 1, "num_stages": 3, "name": f"quantize_per_token {label}"}  # fmt: skip


LEGALITY_SPECIMENS = list(_specimens())
