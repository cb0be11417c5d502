"""Kernels in the style of public tutorials and libraries, with the verdict on every access, in order of the text.

S: one DMA slice. D: a scalar's DMA. G: gather. A: abort. T: atomic.
"""

import triton
import triton.language as tl

from .case import at

VERDICTS = {"S": "dma slice", "D": "scalar dma", "G": "gather", "A": "abort", "T": "atomic"}


@triton.jit
def vector_add(x, y, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + offsets, mask) + tl.load(y + offsets, mask), mask)


@triton.jit
def softmax_rows(x, out, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    values = tl.load(x + row * stride + columns, mask, other=float("-inf"))
    values = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * stride + columns, values / tl.sum(values, 0), mask)


@triton.jit
def layer_norm(x, w, b, out, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    values = tl.load(x + row * n + columns, mask, other=0.0)
    mean = tl.sum(values, 0) / n
    centred = tl.where(mask, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / n + eps)
    result = centred * scale * tl.load(w + columns, mask) + tl.load(b + columns, mask)
    tl.store(out + row * n + columns, result, mask)


@triton.jit
def matmul_wrapped(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The tutorial's way to stay in bounds: rows modulo m. A gather on this card."""
    rows = (tl.program_id(0) * M + tl.arange(0, M)) % m
    columns = (tl.program_id(1) * N + tl.arange(0, N)) % n
    depth = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        left = tl.load(a + rows[:, None] * k + (start + depth)[None, :])
        right = tl.load(b + (start + depth)[:, None] * n + columns[None, :])
        total = tl.dot(left, right, total)
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    tl.store(c + row[:, None] * n + column[None, :], total, (row < m)[:, None] & (column < n)[None, :])


@triton.jit
def matmul_masked(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    depth = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        inside = (start + depth) < k
        within = (rows < m)[:, None] & inside[None, :]
        left = tl.load(a + rows[:, None] * k + (start + depth)[None, :], within, other=0.0)
        within = inside[:, None] & (columns < n)[None, :]
        right = tl.load(b + (start + depth)[:, None] * n + columns[None, :], within, other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * n + columns[None, :], total, (rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def matmul_block_pointers(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    left = tl.make_block_ptr(a, (m, k), (k, 1), (tl.program_id(0) * M, 0), (M, K), (1, 0))
    right = tl.make_block_ptr(b, (k, n), (n, 1), (0, tl.program_id(1) * N), (K, N), (1, 0))
    total = tl.zeros((M, N), tl.float32)
    for _ in range(0, k, K):
        total = tl.dot(tl.load(left, boundary_check=(0, 1)), tl.load(right, boundary_check=(0, 1)), total)
        left, right = tl.advance(left, (0, K)), tl.advance(right, (K, 0))
    out = tl.make_block_ptr(c, (m, n), (n, 1), (tl.program_id(0) * M, tl.program_id(1) * N), (M, N), (1, 0))
    tl.store(out, total, boundary_check=(0, 1))


@triton.jit
def flash_attention(q, k, v, out, tokens, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    head = tl.program_id(1) * tokens * D
    rows, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    query = tl.load(q + head + rows[:, None] * D + d[None, :], (rows < tokens)[:, None], other=0.0)
    most = tl.full((M,), -1e30, tl.float32)
    total = tl.zeros((M,), tl.float32)
    result = tl.zeros((M, D), tl.float32)
    for start in range(0, tokens, N):
        keys = start + tl.arange(0, N)
        # Contiguous along the first dimension: K is loaded transposed, as in the tutorial.
        key = tl.load(k + head + keys[None, :] * D + d[:, None], (keys < tokens)[None, :], other=0.0)
        scores = tl.dot(query, key) * scale
        scores = tl.where((keys < tokens)[None, :], scores, -1e30)
        new = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        factor = tl.exp(most - new)
        total = total * factor + tl.sum(weights, 1)
        value = tl.load(v + head + keys[:, None] * D + d[None, :], (keys < tokens)[:, None], other=0.0)
        result = tl.dot(weights.to(value.dtype), value, result * factor[:, None])
        most = new
    where = out + head + rows[:, None] * D + d[None, :]
    tl.store(where, (result / total[:, None]).to(out.dtype.element_ty), (rows < tokens)[:, None])


@triton.jit
def embedding_rows(ids, table, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    token = tl.load(ids + row)
    tl.store(out + row * n + columns, tl.load(table + token * n + columns, columns < n), columns < n)


@triton.jit
def embedding_flat(ids, table, out, total, n, BLOCK: tl.constexpr):
    flat = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + flat // n, flat < total, other=0)
    tl.store(out + flat, tl.load(table + token * n + flat % n, flat < total), flat < total)


@triton.jit
def histogram(x, counts, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bins = tl.load(x + offsets, offsets < n, other=0)
    tl.atomic_add(counts + bins, 1, offsets < n)


@triton.jit
def dropout_hash(x, out, seed, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.rand(seed, offsets) > 0.5
    tl.store(out + offsets, tl.where(keep, tl.load(x + offsets, offsets < n), 0.0), offsets < n)


@triton.jit
def rotate_half(x, cos, sin, out, HALF: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, HALF)
    low, high = tl.load(x + row * 2 * HALF + d), tl.load(x + row * 2 * HALF + HALF + d)
    c, s = tl.load(cos + row * HALF + d), tl.load(sin + row * HALF + d)
    tl.store(out + row * 2 * HALF + d, low * c - high * s)
    tl.store(out + row * 2 * HALF + HALF + d, high * c + low * s)


@triton.jit
def shuffled_rows(x, out, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A row order by bit operations on a tensor: kills the compiler."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    order = (rows >> 1) + (rows & 1) * 8
    tl.store(out + rows[:, None] * BLOCK + columns[None, :], tl.load(x + order[:, None] * BLOCK + columns[None, :]))


@triton.jit
def silu_mul(x, out, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * width + columns, columns < width).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, columns < width).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), columns < width)


V3, V2 = "*fp32 *fp32 *fp32", "*fp32 *fp32"
B3 = "*bf16 *bf16 *fp32 i32 i32 i32"
TILE = {"M": 128, "N": 128, "K": 64}
# (launch, verdicts, whether nothing found is an abort or an error)
CASES = [
    (at(vector_add, f"{V3} i32", grid=(24,), BLOCK=4096), "SSS", True),
    (at(softmax_rows, f"{V2} i32 i32", grid=(1024,), BLOCK=4096), "SS", True),
    (at(layer_norm, "*fp32 *fp32 *fp32 *fp32 i32 fp32", grid=(512,), BLOCK=4096), "SSSS", True),
    (at(matmul_wrapped, B3, grid=(8, 8), **TILE), "GGS", True),
    (at(matmul_masked, B3, grid=(8, 8), **TILE), "SSS", True),
    (at(matmul_block_pointers, B3, grid=(8, 8), **TILE), "SSS", True),
    (at(flash_attention, "*bf16 *bf16 *bf16 *bf16 i32 fp32", grid=(8, 32), D=64, M=64, N=64), "SSSS", False),
    (at(embedding_rows, "*i32 *bf16 *bf16 i32", grid=(512,), BLOCK=4096), "DSS", True),
    (at(embedding_flat, "*i32 *bf16 *bf16 i32 i32", grid=(512,), BLOCK=4096), "GGS", True),
    (at(histogram, "*i32 *i32 i32", grid=(24,), BLOCK=1024), "ST", True),
    (at(dropout_hash, f"{V2} i32 i32", grid=(24,), BLOCK=1024), "SS", False),
    (at(rotate_half, "*fp32 *fp32 *fp32 *fp32", grid=(512,), HALF=64), "SSSSSS", True),
    (at(shuffled_rows, f"{V2} i32", grid=(8,), ROWS=16, BLOCK=256), "AS", False),
    (at(silu_mul, "*bf16 *bf16 i32", grid=(16, 3), BLOCK=4096), "SSS", True),
]
