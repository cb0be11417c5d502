"""Addresses: what is one DMA slice, what is gathered, what aborts the compiler."""

import triton
import triton.language as tl

from .case import at, rule


@triton.jit
def modulo_on_tensor(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + (i // 8) * 16 + i % 8))


@triton.jit
def modulo_on_scalar(x, y, B: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, B)
    tl.store(y + row * B + i, tl.load(x + (row // 8) * 1024 + (row % 8) * B + i))


@triton.jit
def subtract_on_tensor(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + (n - i)))


@triton.jit
def subtract_on_scalar(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + (n - B) + i))


@triton.jit
def clamp_by_maximum(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + tl.maximum(i + tl.program_id(0), 3)))


@triton.jit
def clamp_by_where(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + tl.where(i < n, i, 0)))


@triton.jit
def maximum_in_disguise(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    # MLIR folds a select of what was compared into arith.maxsi.
    tl.store(y + i, tl.load(x + tl.where(i < 3, 3, i)))


@triton.jit
def wrap_by_and(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + ((i + tl.program_id(0)) & 63)))


@triton.jit
def halve_by_shift(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + ((i + tl.program_id(0)) >> 1)))


@triton.jit
def shift_on_scalar(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + (tl.program_id(0) >> 1) * B + i))


@triton.jit
def carried_by_while(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    p = x + i
    k = 0
    while k < n:
        tl.store(y + i, tl.load(p))
        p += B
        k += 1


@triton.jit
def carried_by_for(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    p = x + i
    for _ in range(n):
        tl.store(y + i, tl.load(p))
        p += B


@triton.jit
def tile5(x, y, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    a = tl.arange(0, A)[:, None, None, None, None] * (B * C * D * E)
    b = tl.arange(0, B)[None, :, None, None, None] * (C * D * E)
    c = tl.arange(0, C)[None, None, :, None, None] * (D * E)
    d = tl.arange(0, D)[None, None, None, :, None] * E
    i = a + b + c + d + tl.arange(0, E)[None, None, None, None, :]
    tl.store(y + i, tl.load(x + i))


@triton.jit
def tile6(x, y, A: tl.constexpr, B: tl.constexpr):
    a = tl.arange(0, A)[:, None, None, None, None, None] * (A * A * A * A * B)
    b = tl.arange(0, A)[None, :, None, None, None, None] * (A * A * A * B)
    c = tl.arange(0, A)[None, None, :, None, None, None] * (A * A * B)
    d = tl.arange(0, A)[None, None, None, :, None, None] * (A * B)
    e = tl.arange(0, A)[None, None, None, None, :, None] * B
    i = a + b + c + d + e + tl.arange(0, B)[None, None, None, None, None, :]
    tl.store(y + i, tl.load(x + i))


@triton.jit
def tile4(x, y, S: tl.constexpr):
    a = tl.arange(0, 2)[:, None, None, None] * (256 * S)
    b = tl.arange(0, 4)[None, :, None, None] * (64 * S)
    c = tl.arange(0, 4)[None, None, :, None] * (16 * S)
    i = a + b + c + tl.arange(0, 16)[None, None, None, :] * S
    tl.store(y + i, tl.load(x + i))


@triton.jit
def rows(x, y, S: tl.constexpr, R: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr = 1):
    i = tl.arange(0, R)[:, None] * S + tl.arange(0, B)[None, :] * STEP
    tl.store(y + i, tl.load(x + i))


@triton.jit
def run_time_rows(x, y, s, R: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, R)[:, None] * s + tl.arange(0, B)[None, :]
    tl.store(y + i, tl.load(x + i))


@triton.jit
def squared(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i * i))


@triton.jit
def one_element(x, y):
    i = tl.arange(0, 1)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def one_scalar(x, y):
    tl.store(y, tl.load(x))


@triton.jit
def indexed_rows(x, index, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    at_row = tl.load(index + i, i < n)
    tl.store(y + i, tl.load(x + at_row * 64, i < n), i < n)


@triton.jit
def indexed_rows_clamped(x, index, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    at_row = tl.where(i < n, tl.load(index + i, i < n), 0)
    tl.store(y + i, tl.load(x + at_row * 64, i < n), i < n)


@triton.jit
def indexed_rows_zero(x, index, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    at_row = tl.load(index + i, i < n, other=0)
    tl.store(y + i, tl.load(x + at_row * 64, i < n), i < n)


@triton.jit
def scalars_in_a_loop(x, y, n):
    for k in range(n):
        tl.store(y + k, tl.load(x + k))


@triton.jit
def tiles_in_a_loop(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    for k in range(n):
        tl.store(y + k * B + i, tl.load(x + k * B + i))


@triton.jit
def grid_stride(x, y, TILES: tl.constexpr, B: tl.constexpr):
    for tile in range(tl.program_id(0), TILES, tl.num_programs(0)):
        i = tile * B + tl.arange(0, B)
        tl.store(y + i, tl.load(x + i))


F = "*fp32 *fp32"
plain = at(rows, F, S=64, R=16, B=64)
CASES = [
    rule("address-gather", at(modulo_on_tensor, F, B=64), at(modulo_on_scalar, F, B=64)),
    rule("address-gather", at(subtract_on_tensor, f"{F} i32", B=64), at(subtract_on_scalar, f"{F} i32", B=64)),
    rule("address-gather", at(clamp_by_where, f"{F} i32", B=64), plain),
    rule("address-abort", at(clamp_by_maximum, F, B=64), at(clamp_by_where, f"{F} i32", B=64)),
    rule("address-abort", at(maximum_in_disguise, F, B=64), at(clamp_by_where, f"{F} i32", B=64)),
    rule("address-abort", at(wrap_by_and, F, B=64), at(modulo_on_scalar, F, B=64)),
    rule("address-abort", at(halve_by_shift, F, B=64), at(shift_on_scalar, F, B=64)),
    rule("address-loop-carried", at(carried_by_while, f"{F} i32", B=64), at(carried_by_for, f"{F} i32", B=64)),
    rule("slice-rank", at(tile5, F, A=2, B=2, C=2, D=2, E=16), at(tile4, F, S=1)),
    rule("dte-rank", at(tile6, F, A=2, B=16), at(tile5, F, A=2, B=2, C=2, D=2, E=16)),
    rule("slice-rank-4", at(tile4, F, S=2), at(tile4, F, S=1)),
    rule("slice-all-ones", at(one_element, F), at(one_scalar, F)),
    rule("slice-strides", at(rows, F, S=100, R=16, B=32, STEP=3), at(rows, F, S=99, R=16, B=32, STEP=3)),
    rule("slice-unit-stride", at(rows, F, S=1, R=16, B=64), plain),
    rule("slice-continual", at(squared, F, B=64), plain),
    rule("dynamic-stride", at(run_time_rows, f"{F} i32", R=16, B=64), plain),
    rule(
        "indirect-clamp",
        at(indexed_rows, "*fp32 *i32 *fp32 i32", B=64),
        at(indexed_rows_clamped, "*fp32 *i32 *fp32 i32", B=64),
    ),
    rule(
        "indirect-clamp",
        at(indexed_rows, "*fp32 *i32 *fp32 i32", B=64),
        at(indexed_rows_zero, "*fp32 *i32 *fp32 i32", B=64),
    ),
    rule("scalar-access-in-loop", at(scalars_in_a_loop, f"{F} i32"), at(tiles_in_a_loop, f"{F} i32", B=64)),
    rule("toolchain-3.3", at(rows, F, S=64, R=1, B=64), plain),
]
