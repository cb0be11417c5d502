"""Element types, operations, atomics and library functions."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .case import at, rule


@triton.jit
def copy(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i < n), i < n)


@triton.jit
def add_float(x, y, value, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i) + value)


@triton.jit
def wide_index(x, y, B: tl.constexpr):
    i = tl.arange(0, B).to(tl.int64)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def to_fp8(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i).to(tl.float8e5))


@triton.jit
def lookup(x, index, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.gather(tl.load(x + i), tl.load(index + i), 0))


@triton.jit
def count(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.atomic_add(y + i, tl.load(x + i))


@triton.jit
def largest(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.atomic_max(y + i, tl.load(x + i))


@triton.jit
def arc_sine(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, libdevice.asin(tl.load(x + i)))


@triton.jit
def hyperbolic_tangent(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, libdevice.tanh(tl.load(x + i)))


F = "*fp32 *fp32"
CASES = [
    rule("no-64-bit-values", at(copy, "*i64 *i64 i32", B=256), at(copy, "*i32 *i32 i32", B=256)),
    rule("no-64-bit-values", at(copy, "*fp64 *fp64 i32", B=256), at(copy, "*fp32 *fp32 i32", B=256)),
    rule("no-64-bit-values", at(add_float, f"{F} fp64", B=256), at(add_float, f"{F} fp32", B=256)),
    rule("no-64-bit-values", at(copy, f"{F} i64", B=256), at(copy, f"{F} i32", B=256)),
    rule("no-64-bit-index", at(wide_index, F, B=256), at(copy, f"{F} i32", B=256)),
    rule("dtype", at(to_fp8, "*fp32 *fp8e5", B=256), at(copy, "*bf16 *bf16 i32", B=256)),
    rule("unsupported-operation", at(lookup, "*fp32 *i32 *fp32", B=256), at(copy, f"{F} i32", B=256)),
    rule("atomics", at(largest, "*i32 *i32", B=256), at(count, "*i32 *i32", B=256)),
    rule("extern-function", at(arc_sine, F, B=256), at(hyperbolic_tangent, F, B=256)),
]
