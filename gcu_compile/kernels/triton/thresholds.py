"""Thresholds of min-p, top-k and top-p in one row of logits, without a sort. Device functions.

Each pass over the row counts, or weighs, from several pivots on at once, and shrinks the interval between the last
pivot that reaches the goal and the first that does not to values that occur. Pivots lie evenly by value and by key in
turn: the first is quick for what models make, the second ends within 32 bits whatever the values.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds
from gcu_compile.kernels.triton import logits, masses

LOWEST = tl.constexpr(-2139095039)  # ordered(-FLT_MAX): -inf is below
INT_MAX = tl.constexpr(2147483647)
INT_MIN = tl.constexpr(-2147483648)


@triton.jit
def _pick(values, index, PIVOTS: tl.constexpr):
    """values[index] of a tensor of PIVOTS integers; 0 beyond it."""
    return tl.sum(tl.where(tl.arange(0, PIVOTS) == index, values, 0), axis=0)


@triton.jit
def _span(low, high):
    """high - low of two keys, which may need all 32 bits."""
    return high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)


@triton.jit
def _pivots(low, high, by_value, PIVOTS: tl.constexpr):
    """PIVOTS ascending keys of [low, high), the first one `low`: evenly spaced by value, or by key."""
    j = tl.arange(0, PIVOTS)
    step = (_span(low, high) // PIVOTS).to(tl.int32, bitcast=True)
    keys = low + j * tl.where(step == 0, 1, step)
    first, last = logits.unordered(low), logits.unordered(high - 1)
    values = first + (last - first) * (j.to(tl.float32) * (1.0 / PIVOTS))
    usable = (last - first < 3.0e38) & by_value
    keys = tl.where(usable, logits.ordered(values), keys)
    keys = tl.where(keys >= high, high - 1, keys)
    keys = tl.where(keys < low, low, keys)
    return tl.where(j == 0, low, keys)


@triton.jit
def min_p(share, maximum, top, inv0, inv1, inv2, PIVOTS: tl.constexpr):
    """The smallest key whose weight is at least `share` of the largest; `top` is the maximum's key."""
    low, high = top * 0 + LOWEST, top + 1
    # Every round divides the interval by PIVOTS = 16; keys have 32 bits.
    for _ in range(9):
        j = tl.arange(0, PIVOTS)
        step = (_span(low, high) // PIVOTS).to(tl.int32, bitcast=True)
        keys = low + j * tl.where(step == 0, 1, step)
        keys = tl.where(keys >= high, high - 1, keys)
        hi, lo = masses.weight(logits.unordered(keys), maximum, inv0, inv1, inv2)
        below = tl.sum(tl.where(ds.at_least(hi, lo, share, 0.0), 0, 1), axis=0)
        # The floor lies above the last key that is too light, and not above the first that is not.
        new_high = tl.where(below < PIVOTS, _pick(keys, below, PIVOTS) + 1, high)
        low = tl.where(below > 0, _pick(keys, below - 1, PIVOTS) + 1, low)
        low = tl.where(low > top, top, low)
        high = tl.where(below == 0, low + 1, new_high)
    return low


@triton.jit
def _measure(row, at, vocab, low, high, pivots, scale, WEIGH: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """What the row's keys in [low, high) say about each pivot.

    Returns:
        Tensors of PIVOTS int32: how many keys are at least the pivot; the smallest of those; the largest key below
        the pivot; and, with WEIGH, the mass of those at least the pivot (integer part and four limbs).
    """
    maximum, inv0, inv1, inv2 = scale
    count = tl.zeros([PIVOTS], dtype=tl.int32)
    least = tl.zeros([PIVOTS], dtype=tl.int32) + INT_MAX
    most = tl.zeros([PIVOTS], dtype=tl.int32) + INT_MIN
    m, a0, a1, a2, a3 = count, count, count, count, count
    for start in range(0, vocab, BLOCK):
        z, at = logits.tile(row, at, start, vocab, BLOCK)
        key = logits.ordered(z)
        inside = (key >= low) & (key < high)
        if tl.max(inside.to(tl.int32), axis=0) > 0:
            reach = inside[None, :] & (key[None, :] >= pivots[:, None])
            short = inside[None, :] & (key[None, :] < pivots[:, None])
            count += tl.sum(reach.to(tl.int32), axis=1)
            least = tl.minimum(least, tl.min(tl.where(reach, key[None, :], INT_MAX), axis=1))
            most = tl.maximum(most, tl.max(tl.where(short, key[None, :], INT_MIN), axis=1))
            if WEIGH:
                hi, lo = masses.weight(z, maximum, inv0, inv1, inv2)
                w0, w1, w2, w3 = masses.limbs(hi, lo)
                t, t0, t1, t2, t3 = masses.tile_sum(w0[None, :], w1[None, :], w2[None, :], w3[None, :], reach, 1)
                m, a0, a1, a2, a3 = masses.carry(m + t, a0 + t0, a1 + t1, a2 + t2, a3 + t3)
    return count, least, most, (m, a0, a1, a2, a3)


@triton.jit
def weight_of(key, scale):
    """Weight of one key as its limbs make it, a pair."""
    maximum, inv0, inv1, inv2 = scale
    hi, lo = masses.weight(logits.unordered(key), maximum, inv0, inv1, inv2)
    w0, w1, w2, w3 = masses.limbs(hi, lo)
    m, w0, w1, w2, w3 = masses.carry(w0 * 0, w0, w1, w2, w3)
    return masses.value(m, w0, w1, w2, w3)


@triton.jit
def top_k(row, at, vocab, threshold, top, k, scale, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """The threshold of the k largest keys from `threshold` on; how many that equal it are kept; how many are not.

    With no more than k keys, all are kept.
    """
    low, high, above, here = threshold, top + 1, k * 0, k * 0
    by_value, first, whole = k * 0 + 1, k * 0 + 1, k * 0
    while ((_span(low, high) > 1) | (first == 1)) & (whole == 0):
        pivots = _pivots(low, high, by_value == 1, PIVOTS)
        count, least, most, _ = _measure(row, at, vocab, low, high, pivots, scale, False, BLOCK, PIVOTS)
        reached = (above + count >= k).to(tl.int32)
        whole = tl.where(_pick(reached, 0, PIVOTS) == 0, 1, 0)
        last = tl.sum(reached, axis=0) - 1
        here = _pick(count, last, PIVOTS) - _pick(count, last + 1, PIVOTS)
        above += _pick(count, last + 1, PIVOTS)
        high = tl.where(last + 1 < PIVOTS, _pick(most, last + 1, PIVOTS) + 1, high)
        low = tl.where(whole == 1, threshold, _pick(least, last, PIVOTS))
        by_value, first = 1 - by_value, k * 0
    ties = tl.where(whole == 1, INT_MAX, k - above)
    return low, ties, tl.where(whole == 1, 0, here - ties)


@triton.jit
def top_p(row, at, vocab, threshold, ties, excess, top, p, scale, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """The threshold of the shortest prefix of the kept set that has the share p of its mass.

    Args:
        threshold, ties, excess: of the set so far, of `top_k`.

    Returns:
        The new threshold, how many of the tokens that equal it are kept, and the prefix's mass as a pair.
    """
    low, high, above, here = threshold, top + 1, top * 0, top * 0
    m, a0, a1, a2, a3 = above, above, above, above, above
    goal_h, goal_l = p * 0.0, p * 0.0
    by_value, first = top * 0 + 1, top * 0 + 1
    while (_span(low, high) > 1) | (first == 1):
        pivots = _pivots(low, high, by_value == 1, PIVOTS)
        count, least, most, mass = _measure(row, at, vocab, low, high, pivots, scale, True, BLOCK, PIVOTS)
        t, t0, t1, t2, t3 = mass
        t, t0, t1, t2, t3 = masses.carry(m + t, a0 + t0, a1 + t1, a2 + t2, a3 + t3)
        hi, lo = masses.value(t, t0, t1, t2, t3)
        if first == 1:
            # The first pivot is the set's threshold: of the tokens that equal it, `excess` are not in the set.
            total_h = tl.sum(tl.where(tl.arange(0, PIVOTS) == 0, hi, 0.0), axis=0)
            total_l = tl.sum(tl.where(tl.arange(0, PIVOTS) == 0, lo, 0.0), axis=0)
            w_h, w_l = weight_of(threshold, scale)
            out_h, out_l = ds.multiply(w_h, w_l, -excess.to(tl.float32), 0.0)
            total_h, total_l = ds.add(total_h, total_l, out_h, out_l)
            goal_h, goal_l = ds.multiply(total_h, total_l, p, 0.0)
        reached = (ds.at_least(hi, lo, goal_h, goal_l) & (above + count > 0)).to(tl.int32)
        # The set as a whole reaches the goal, whatever the last bit of the goal says.
        last = tl.sum(tl.where(tl.arange(0, PIVOTS) == 0, 1, reached), axis=0) - 1
        here = _pick(count, last, PIVOTS) - _pick(count, last + 1, PIVOTS)
        beyond = last + 1 < PIVOTS
        above += _pick(count, last + 1, PIVOTS)
        m = tl.where(beyond, _pick(t, last + 1, PIVOTS), m)
        a0 = tl.where(beyond, _pick(t0, last + 1, PIVOTS), a0)
        a1 = tl.where(beyond, _pick(t1, last + 1, PIVOTS), a1)
        a2 = tl.where(beyond, _pick(t2, last + 1, PIVOTS), a2)
        a3 = tl.where(beyond, _pick(t3, last + 1, PIVOTS), a3)
        high = tl.where(beyond, _pick(most, last + 1, PIVOTS) + 1, high)
        low = _pick(least, last, PIVOTS)
        by_value, first = 1 - by_value, top * 0
    base_h, base_l = masses.value(m, a0, a1, a2, a3)
    w_h, w_l = weight_of(low, scale)
    available = tl.where((low == threshold) & (ties < here), ties, here)
    need = tl.where(above > 0, 0, 1)
    if w_h > 0.0:
        rest_h, _ = ds.add(goal_h, goal_l, -base_h, -base_l)
        guess = (rest_h / w_h).to(tl.int32) - 1
        need = tl.where(guess > need, guess, need)
        # The quotient is off by less than one.
        for _ in range(4):
            out_h, out_l = ds.multiply(w_h, w_l, need.to(tl.float32), 0.0)
            out_h, out_l = ds.add(base_h, base_l, out_h, out_l)
            enough = ds.at_least(out_h, out_l, goal_h, goal_l) & (need > 0)
            need = tl.where(enough, need, need + 1)
    need = tl.where(need > available, available, need)
    out_h, out_l = ds.multiply(w_h, w_l, need.to(tl.float32), 0.0)
    base_h, base_l = ds.add(base_h, base_l, out_h, out_l)
    return low, need, base_h, base_l
