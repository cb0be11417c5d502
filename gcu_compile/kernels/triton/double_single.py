"""Arithmetic on pairs of float32, about 48 bits, for devices without float64. Device functions.

A pair (hi, lo) stands for hi + lo with |lo| <= ulp(hi) / 2. The sums and products are those of Dekker (1971) and Knuth
(TAOCP 2, 4.2.2); they are exact only if the compiler neither reassociates nor contracts `a * b + c` (launch with
`exact=True`, see launch.py).
"""

import triton
import triton.language as tl

LN2_1 = tl.constexpr(0.693145751953125)  # ln 2 rounded to 16 bits, so that k * LN2_1 is exact for |k| < 2**8
LN2_2 = tl.constexpr(1.4286197256296873e-06)  # the next 16 bits, so that k * LN2_2 is exact too
LN2_3 = tl.constexpr(-1.2905320041778356e-11)  # the rest
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def two_sum(a, b):
    """a + b as a pair, exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def quick_two_sum(a, b):
    """a + b as a pair, exactly, for |a| >= |b|."""
    s = a + b
    return s, b - (s - a)


@triton.jit
def high_half(a):
    """The upper 12 bits of a's significand; a minus it is exact and has 12 bits too."""
    return (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def two_product(a, b):
    """a * b as a pair, exactly unless it underflows."""
    p = a * b
    ah, bh = high_half(a), high_half(b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


@triton.jit
def add(ah, al, bh, bl):
    """Sum of two pairs, error below 2**-46 of it."""
    s, e = two_sum(ah, bh)
    t, f = two_sum(al, bl)
    s, e = quick_two_sum(s, e + t)
    return quick_two_sum(s, e + f)


@triton.jit
def multiply(ah, al, bh, bl):
    """Product of two pairs, error below 2**-46 of it."""
    p, e = two_product(ah, bh)
    return quick_two_sum(p, e + (ah * bl + al * bh))


@triton.jit
def at_least(ah, al, bh, bl):
    """Whether the pair a >= the pair b."""
    return (ah > bh) | ((ah == bh) & (al >= bl))


@triton.jit
def inverse(t):
    """1 / t as three float32, error below 2**-70 of it."""
    first = tl.div_rn(1.0, t)
    p, e = two_product(first, t)
    rest = (1.0 - p) - e
    second = tl.div_rn(rest, t)
    q, f = two_product(second, t)
    return first, second, tl.div_rn((rest - q) - f, t)


@triton.jit
def reciprocal(ah, al):
    """1 / a pair, as a pair; error below 2**-45 of it."""
    first = tl.div_rn(1.0, ah)
    p, e = two_product(first, ah)
    return quick_two_sum(first, first * (((1.0 - p) - e) - first * al))


@triton.jit
def _step(rh, rl, sh, sl, ch, cl):
    """c + r * s, one step of Horner's rule, for |c| > |r * s|."""
    ph, pl = multiply(rh, rl, sh, sl)
    hi, e = quick_two_sum(ch, ph)
    return quick_two_sum(hi, e + (cl + pl))


@triton.jit
def exp(xh, xl):
    """exp of a pair in [-60, 0]: error below 2**-42 of it, about 2**-46 near 0.

    Down to -87 the low part underflows and the error grows to 2**-24; below that the result is meaningless.

    Taylor's series to degree 12 after reduction by multiples of ln 2: from degree 7 on in float32, whose rounding is
    then below 2**-47 of the result.
    """
    shifted = xh * LOG2_E - 0.5
    k = shifted.to(tl.int32)
    n = k.to(tl.float32)
    r, e = two_sum(xh, -(n * LN2_1))
    r, f = two_sum(r, -(n * LN2_2))
    r, rl = quick_two_sum(r, (xl + e) + (f - n * LN2_3))
    tail = 2.5052107943679403e-08 + r * 2.0876755879584152e-09
    tail = 2.755731998149713e-07 + r * tail
    tail = 2.7557318844628753e-06 + r * tail
    tail = 2.4801587642286904e-05 + r * tail
    tail = 1.9841270113829523e-04 + r * tail
    sh, sl = quick_two_sum(1.3888889225199819e-03, r * tail)
    sl = sl - 3.3631094437103215e-11
    sh, sl = _step(r, rl, sh, sl, 8.333333767950535e-03, -4.34617203337595e-10)
    sh, sl = _step(r, rl, sh, sl, 4.16666679084301e-02, -1.2417634698280722e-09)
    sh, sl = _step(r, rl, sh, sl, 0.1666666716337204, -4.967053879312289e-09)
    sh, sl = _step(r, rl, sh, sl, 0.5, 0.0)
    sh, sl = _step(r, rl, sh, sl, 1.0, 0.0)
    sh, sl = _step(r, rl, sh, sl, 1.0, 0.0)
    scale = ((k + 127) << 23).to(tl.float32, bitcast=True)
    return sh * scale, sl * scale
