"""Dots, reductions and scans."""

import triton
import triton.language as tl

from .case import at, rule


@triton.jit
def product(x, w, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr = "ieee"):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.load(w + k[:, None] * N + n[None, :])
    c = tl.dot(a, b, input_precision=P)
    tl.store(y + m[:, None] * N + n[None, :], c.to(y.dtype.element_ty))


@triton.jit
def sums(x, y, R: tl.constexpr, C: tl.constexpr):
    r = tl.arange(0, R)
    tile = tl.load(x + r[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(y + r, tl.sum(tile, 1))


@triton.jit
def maxima(x, y, R: tl.constexpr, C: tl.constexpr):
    r = tl.arange(0, R)
    tile = tl.load(x + r[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(y + r, tl.max(tile, 1))


@triton.jit
def running(x, y, R: tl.constexpr, C: tl.constexpr, AXIS: tl.constexpr):
    i = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(y + i, tl.cumsum(tl.load(x + i), AXIS))


H, B, F = "*fp16 *fp16 *fp16", "*bf16 *bf16 *fp32", "*fp32 *fp32 *fp32"
big = {"M": 128, "N": 128, "K": 64}
CASES = [
    rule("dot-precision", at(product, F, **big, P="tf32"), at(product, F, **big, P="ieee")),
    rule("dot-shape", at(product, B, M=16, N=16, K=32), at(product, B, **big)),
    rule("dot-shape", at(product, B, M=16, N=128, K=64), at(product, B, **big), "gcu400"),
    rule("dot-warps", at(product, B, warps=1, **big), at(product, B, warps=4, **big), "gcu400"),
    rule("dot-many-warps", at(product, H, warps=8, M=128, N=256, K=64), at(product, H, warps=4, M=128, N=256, K=64)),
    rule("reduce-shape", at(sums, "*fp32 *fp32", R=4, C=128), at(sums, "*fp32 *fp32", R=128, C=128)),
    rule("reduce-shape", at(maxima, "*fp32 *fp32", R=16, C=128), at(maxima, "*fp32 *fp32", R=16, C=512)),
    rule("scan-shape", at(running, "*fp32 *fp32", R=4, C=64, AXIS=1), at(running, "*fp32 *fp32", R=4, C=128, AXIS=0)),
]
