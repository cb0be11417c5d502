"""Masks: which become bounds of a slice, which gather, which abort."""

import triton
import triton.language as tl

from .case import at, rule


@triton.jit
def less(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


@triton.jit
def less_equal(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i <= n), i < n)


@triton.jit
def greater_equal(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i >= n), i < n)


@triton.jit
def equal(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i == n), i < n)


@triton.jit
def inverted(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    within = i < n
    tl.store(y + i, tl.load(x + i, ~within), within)


@triton.jit
def loaded(x, keep, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, tl.load(keep + i) != 0))


@triton.jit
def selected_after(x, keep, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.where(tl.load(keep + i) != 0, tl.load(x + i), 0.0))


@triton.jit
def either(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, (i < n) | (i > 100)), i < n)


@triton.jit
def both(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, (i < n) & (i >= 3)), i < n)


@triton.jit
def least(x, y, n, m, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, tl.minimum(i, m + i) < n), i < n)


@triton.jit
def least_of_scalars(x, y, n, m, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i < tl.minimum(n, m)), i < n)


@triton.jit
def triangle(x, y, S: tl.constexpr, B: tl.constexpr):
    r, c = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    tl.store(y + r * S + c, tl.load(x + r * S + c, r >= c))


@triton.jit
def rectangle(x, y, n, m, S: tl.constexpr, B: tl.constexpr):
    r, c = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    within = (r < n) & (c < m)
    tl.store(y + r * S + c, tl.load(x + r * S + c, within), within)


@triton.jit
def other_tensor(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i < n, other=i.to(tl.float32)))


@triton.jit
def other_value(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i < n, other=float("-inf")))


F = "*fp32 *fp32 i32"
K = "*fp32 *i8 *fp32"
CASES = [
    rule("mask-gather", at(less_equal, F, B=64), at(less, F, B=64)),
    rule("mask-gather", at(equal, F, B=64), at(greater_equal, F, B=64)),
    rule("mask-gather", at(inverted, F, B=64), at(less, F, B=64)),
    rule("mask-gather", at(loaded, K, B=64), at(selected_after, K, B=64)),
    rule("mask-full-compare", at(triangle, "*fp32 *fp32", S=64, B=64), at(rectangle, f"{F} i32", S=64, B=64)),
    rule("mask-abort", at(either, F, B=64), at(both, F, B=64)),
    rule("mask-abort", at(least, f"{F} i32", B=64), at(least_of_scalars, f"{F} i32", B=64)),
    rule("mask-other", at(other_tensor, F, B=64), at(other_value, F, B=64)),
]
