"""Sums of weights that are exact, so that no split of the vocabulary and no order can change them. Device functions.

A weight w in [0, 1] is an integer multiple of 2**-64, held in four signed limbs of 16 bits; a sum is five int32: its
integer part and four limbs. Sums of up to 8192 limbs fit int32 before carries are taken.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds

HALF = tl.constexpr(1.52587890625e-05)  # 2**-16


@triton.jit
def weight(z, maximum, inv0, inv1, inv2):
    """exp((z - maximum) / T) as a pair; 1 / T is inv0 + inv1 + inv2. Zero below exp(-80); 1 where float64 has 1."""
    dh, dl = ds.two_sum(z, -maximum)
    ph, pl = ds.two_product(dh, inv0)
    xh, xl = ds.quick_two_sum(ph, pl + (dh * inv1 + dl * inv0) + dh * inv2)
    alive = (xh > -80.0) & (z < maximum)
    hi, lo = ds.exp(tl.where(alive, xh, 0.0), tl.where(alive, xl, 0.0))
    # The maximum weighs 1 even if it is infinite; so does what float64's exp rounds to 1.
    one = (z == maximum) | (alive & (xh > -5.551115123125783e-17))
    hi = tl.where(one, 1.0, tl.where(alive, hi, 0.0))
    return hi, tl.where(alive & (xh <= -5.551115123125783e-17), lo, 0.0)


@triton.jit
def limbs(hi, lo):
    """The four limbs of a weight, in units of 2**-16, 2**-32, 2**-48 and 2**-64."""
    t = hi * 65536.0
    a0 = t.to(tl.int32)
    t = (t - a0.to(tl.float32)) * 65536.0
    a1 = t.to(tl.int32)
    t = (t - a1.to(tl.float32)) * 65536.0
    a2 = t.to(tl.int32)
    a3 = ((t - a2.to(tl.float32)) * 65536.0).to(tl.int32)
    t = lo * 4294967296.0
    b1 = t.to(tl.int32)
    t = (t - b1.to(tl.float32)) * 65536.0
    b2 = t.to(tl.int32)
    b3 = ((t - b2.to(tl.float32)) * 65536.0).to(tl.int32)
    return a0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def carry(m, a0, a1, a2, a3):
    """The same sum with all limbs in [0, 65536)."""
    a2 = a2 + (a3 >> 16)
    a1 = a1 + (a2 >> 16)
    a0 = a0 + (a1 >> 16)
    return m + (a0 >> 16), a0 & 0xFFFF, a1 & 0xFFFF, a2 & 0xFFFF, a3 & 0xFFFF


@triton.jit
def value(m, a0, a1, a2, a3):
    """A carried sum as a pair of float32."""
    hi, lo = ds.quick_two_sum(m.to(tl.float32), a0.to(tl.float32) * HALF)
    rest = a1.to(tl.float32) + (a2.to(tl.float32) * HALF + a3.to(tl.float32) * (HALF * HALF))
    s, e = ds.two_sum(hi, rest * (HALF * HALF))
    return ds.quick_two_sum(s, lo + e)


@triton.jit
def tile_sum(a0, a1, a2, a3, chosen, axis: tl.constexpr):
    """Sum over `axis` of the limbs where `chosen`, carried."""
    s0 = tl.sum(tl.where(chosen, a0, 0), axis=axis)
    s1 = tl.sum(tl.where(chosen, a1, 0), axis=axis)
    s2 = tl.sum(tl.where(chosen, a2, 0), axis=axis)
    s3 = tl.sum(tl.where(chosen, a3, 0), axis=axis)
    return carry(s0 * 0, s0, s1, s2, s3)


@triton.jit
def share(hi, lo, uh, ul):
    """u times a mass, as a goal for `place`: below the whole mass, to which rounding must not lift it."""
    goal_h, goal_l = ds.multiply(hi, lo, uh, ul)
    below = lo - hi * 1.4210854715202004e-14
    full = ds.at_least(goal_h, goal_l, hi, below)
    return tl.where(full, hi, goal_h), tl.where(full, below, goal_l)


@triton.jit
def place(weights, chosen, before, goal_h, goal_l, BLOCK: tl.constexpr, HALVES: tl.constexpr):
    """Where in a tile the sum of the chosen weights' limbs on top of `before`, a carried sum, exceeds the goal.

    The longest prefix that does not, by halves.
    """
    w0, w1, w2, w3 = weights
    m, a0, a1, a2, a3 = before
    at = tl.arange(0, BLOCK)
    below = m * 0
    for halving in tl.static_range(HALVES):
        step = BLOCK >> (halving + 1)
        t, t0, t1, t2, t3 = tile_sum(w0, w1, w2, w3, chosen & (at < below + step), 0)
        t, t0, t1, t2, t3 = carry(m + t, a0 + t0, a1 + t1, a2 + t2, a3 + t3)
        hi, lo = value(t, t0, t1, t2, t3)
        below = tl.where(ds.at_least(goal_h, goal_l, hi, lo), below + step, below)
    return below
