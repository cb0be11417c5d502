"""Grid, warps, stages and memories."""

import triton
import triton.language as tl

from .case import at, rule
from .compute import product
from .types import copy


@triton.jit
def blocked_product(x, w, y, k_tiles, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for t in range(k_tiles):
        a = tl.load(x + m[:, None] * S + t * K + k[None, :])
        b = tl.load(w + t * K * N + k[:, None] * N + n[None, :])
        total = tl.dot(a, b, total)
    tl.store(y + m[:, None] * N + n[None, :], total)


@triton.jit
def sum_of(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(y, tl.sum(v, 0))
    tl.store(y + 1 + i, v)


@triton.jit
def broken(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i) + tl.arange(0, 2 * B))


F = "*fp32 *fp32 i32"
G = "*bf16 *bf16 *fp32 i32"
CASES = [
    rule("grid", at(copy, F, grid=(65536,), B=256), at(copy, F, grid=(65535,), B=256)),
    rule("grid", at(copy, F, grid=(1, 256), B=256), at(copy, F, grid=(1, 255, 255), B=256)),
    rule("warps", at(copy, F, warps=16, B=4096), at(copy, F, warps=8, B=4096)),
    rule("warps", at(copy, F, warps=3, B=256), at(copy, F, warps=2, B=256)),
    rule("warps", at(copy, F, warps=8, B=4096), at(copy, F, warps=4, B=4096), "gcu400"),
    rule(
        "stages",
        at(blocked_product, G, stages=1, M=128, N=128, K=64, S=4096),
        at(blocked_product, G, stages=3, M=128, N=128, K=64, S=4096),
    ),
    rule(
        "stages",
        at(blocked_product, G, stages=7, M=128, N=128, K=64, S=4096),
        at(blocked_product, G, stages=6, M=128, N=128, K=64, S=4096),
    ),
    rule("l1-bytes", at(sum_of, "*fp32 *fp32", warps=1, B=524288), at(sum_of, "*fp32 *fp32", warps=1, B=131072)),
    rule(
        "l1-pingpong",
        at(blocked_product, G, warps=1, M=256, N=512, K=512, S=4096),
        at(blocked_product, G, warps=4, M=256, N=512, K=512, S=4096),
    ),
    rule(
        "l2-bytes",
        at(product, "*fp32 *fp32 *fp32", warps=4, M=1024, N=512, K=1024),
        at(product, "*fp32 *fp32 *fp32", warps=4, M=128, N=128, K=64),
        "gcu400",
    ),
    rule("compiles", at(broken, "*fp32 *fp32", B=64), at(copy, F, B=64)),
]
