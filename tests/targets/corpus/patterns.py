"""Patterns that compile and were measured to give wrong numbers."""

import triton
import triton.language as tl

from .case import at, rule


@triton.jit
def column_sums(x, y, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    c = tl.program_id(0) * C + tl.arange(0, C)
    tile = tl.load(x + c[:, None] + tl.arange(0, R)[None, :] * S)
    tl.store(y + c, tl.sum(tile, 1))


@triton.jit
def row_sums(x, y, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    c = tl.program_id(0) * C + tl.arange(0, C)
    tile = tl.load(x + c[:, None] * S + tl.arange(0, R)[None, :])
    tl.store(y + c, tl.sum(tile, 1))


@triton.jit
def strided_rows(x, y, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    c = tl.program_id(0) * C + tl.arange(0, C)
    tile = tl.load(x + c[:, None] * S + tl.arange(0, R)[None, :] * 2)
    tl.store(y + c, tl.sum(tile, 1))


@triton.jit
def transpose(x, y, B: tl.constexpr):
    r, c = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    tl.store(y + r * B + c, tl.trans(tl.load(x + r * B + c)))


@triton.jit
def transposed_load(x, y, B: tl.constexpr):
    r, c = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    tl.store(y + r * B + c, tl.load(x + c * B + r))


@triton.jit
def straight(x, y, B: tl.constexpr):
    r, c = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    tl.store(y + r * B + c, tl.load(x + r * B + c))


F = "*fp32 *fp32"
CASES = [
    rule("strided-reduction-block", at(strided_rows, F, S=512, R=128, C=1), at(row_sums, F, S=512, R=128, C=1)),
    rule("strided-reduction-block", at(strided_rows, F, S=512, R=128, C=2), at(strided_rows, F, S=512, R=128, C=4)),
    rule("transposed-tile", at(transpose, F, B=32), at(straight, F, B=32)),
    rule("transposed-tile", at(transposed_load, F, B=32), at(straight, F, B=32)),
    rule("transposed-tile", at(column_sums, F, S=512, R=128, C=64), at(row_sums, F, S=512, R=128, C=64)),
]
