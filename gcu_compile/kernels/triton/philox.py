"""Philox4x32-10 (Salmon et al. 2011) in 32-bit arithmetic. Device functions on scalars or tensors of uint32."""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds


@triton.jit
def multiply_high(a, b):
    """Upper 32 bits of a product of two uint32, from 16-bit halves: not every card multiplies 64 bits wide."""
    al, ah = a & 0xFFFF, a >> 16
    bl, bh = b & 0xFFFF, b >> 16
    low, middle = al * bl, ah * bl
    carry = (low >> 16) + (middle & 0xFFFF) + al * bh
    return ah * bh + (middle >> 16) + (carry >> 16)


@triton.jit
def philox(k0, k1, c0, c1, stream: tl.constexpr):
    """The first two of the four uint32 at key (k0, k1) and counter (c0, c1, stream, 0)."""
    m0 = (k0 * 0 + 0xD2511F53).to(tl.uint32)
    m1 = (k0 * 0 + 0xCD9E8D57).to(tl.uint32)
    c2 = k0 * 0 + stream
    c3 = k0 * 0
    for _ in tl.static_range(10):
        high, low = multiply_high(m0, c0), m0 * c0
        high2, low2 = multiply_high(m1, c2), m1 * c2
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high ^ c3 ^ k1, low
        k0 = k0 + (k0 * 0 + 0x9E3779B9)
        k1 = k1 + (k1 * 0 + 0xBB67AE85)
    return c0, c1


@triton.jit
def uniform(k0, k1, c0, c1, stream: tl.constexpr):
    """53 random bits as a pair of float32 in [0, 1); `sampling/eager.py` has the same number in float64.

    Args:
        k0, k1, c0, c1: uint32, low and high words of seed and position.
        stream: 0 for the draw of a token, 1 for the acceptance of a draft token.
    """
    r0, r1 = philox(k0, k1, c0, c1, stream)
    # Halves fit int32; a float conversion of uint32 does not exist everywhere.
    high = (r0 >> 16).to(tl.int32).to(tl.float32) * 1.52587890625e-05
    low = (r0 & 0xFFFF).to(tl.int32).to(tl.float32) * 2.3283064365386963e-10
    rest = (r1 >> 11).to(tl.int32).to(tl.float32) * 1.1102230246251565e-16
    hi, lo = ds.quick_two_sum(high, low)
    return ds.quick_two_sum(hi, lo + rest)


@triton.jit
def uniform_of(seeds_ptr, positions_ptr, index, stream: tl.constexpr):
    """`uniform` of row `index`; seeds and positions are [rows, 2] int32, low and high words."""
    seed, position = seeds_ptr + 2 * index, positions_ptr + 2 * index
    return uniform(
        tl.load(seed).to(tl.uint32, bitcast=True),
        tl.load(seed + 1).to(tl.uint32, bitcast=True),
        tl.load(position).to(tl.uint32, bitcast=True),
        tl.load(position + 1).to(tl.uint32, bitcast=True),
        stream,
    )
