"""Thresholds of min-p, top-k and top-p in one row of logits, without a sort. Device functions.

Each pass over the row counts, or weighs, from several pivots on at once, and shrinks the interval between the last
pivot that reaches the goal and the first that does not to values that occur. Pivots lie evenly by value and by key in
turn: the first is quick for what models make, the second ends within 32 bits whatever the values.

The search is a machine whose state is a tuple (`begin`); each pass is `pivots_of`, `measure`, `advance`. Stage 0 counts
for top-k, stage 1 weighs for top-p and for the mass of the kept set, stage 2 is done. So one program can run all
passes of a row, or many can share each pass (`sample_split_kernel.py`).
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds
from gcu_compile.kernels.triton import logits, masses

LOWEST = tl.constexpr(-2139095039)  # ordered(-FLT_MAX): -inf is below
INT_MAX = tl.constexpr(2147483647)
INT_MIN = tl.constexpr(-2147483648)


@triton.jit
def pick(values, index, PIVOTS: tl.constexpr):
    """values[index] of a tensor of PIVOTS integers; 0 beyond it."""
    return tl.sum(tl.where(tl.arange(0, PIVOTS) == index, values, 0), axis=0)


@triton.jit
def _span(low, high):
    """high - low of two keys, which may need all 32 bits."""
    return high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)


@triton.jit
def pivots_of(state, PIVOTS: tl.constexpr):
    """PIVOTS ascending keys of the state's interval, the first one its lower end: evenly spaced by value, or by key."""
    stage, threshold, ties, excess, low, high, above, by_value, first, mass, goal, total = state
    j = tl.arange(0, PIVOTS)
    step = (_span(low, high) // PIVOTS).to(tl.int32, bitcast=True)
    keys = low + j * tl.where(step == 0, 1, step)
    bottom, top = logits.unordered(low), logits.unordered(high - 1)
    values = bottom + (top - bottom) * (j.to(tl.float32) * (1.0 / PIVOTS))
    usable = (top - bottom < 3.0e38) & (by_value == 1)
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
        new_high = tl.where(below < PIVOTS, pick(keys, below, PIVOTS) + 1, high)
        low = tl.where(below > 0, pick(keys, below - 1, PIVOTS) + 1, low)
        low = tl.where(low > top, top, low)
        high = tl.where(below == 0, low + 1, new_high)
    return low


@triton.jit
def measure(row, at, start, end, state, pivots, scale, vocab, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """What the row's keys at ids [start, end), within the state's interval, say about each pivot.

    Returns:
        Tensors of PIVOTS int32: how many keys are at least the pivot; the smallest of those; the largest key below
        the pivot; and, in stage 1, the mass of those at least the pivot (integer part and four limbs).
    """
    stage, threshold, ties, excess, low, high, above, by_value, first, mass, goal, total = state
    maximum, inv0, inv1, inv2 = scale
    count = tl.zeros([PIVOTS], dtype=tl.int32)
    least = tl.zeros([PIVOTS], dtype=tl.int32) + INT_MAX
    most = tl.zeros([PIVOTS], dtype=tl.int32) + INT_MIN
    m, a0, a1, a2, a3 = count, count, count, count, count
    for begin_tile in range(start, end, BLOCK):
        z, at = logits.tile(row, at, begin_tile, vocab, BLOCK)
        key = logits.ordered(z)
        inside = (key >= low) & (key < high)
        if tl.max(inside.to(tl.int32), axis=0) > 0:
            reach = inside[None, :] & (key[None, :] >= pivots[:, None])
            short = inside[None, :] & (key[None, :] < pivots[:, None])
            count += tl.sum(reach.to(tl.int32), axis=1)
            least = tl.minimum(least, tl.min(tl.where(reach, key[None, :], INT_MAX), axis=1))
            most = tl.maximum(most, tl.max(tl.where(short, key[None, :], INT_MIN), axis=1))
            if stage == 1:
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
def begin(threshold, top, k, vocab):
    """The search's first state: all keys from `threshold` on are kept; `top` is the largest.

    (stage, threshold, ties, excess, low, high, above, by_value, first, mass, goal, total): kept so far are the keys
    above `threshold` and the first `ties`, by id, of those that equal it; `excess` that equal it are not. The answer
    lies in [low, high); `above` keys of mass `mass` lie beyond. goal, total: masses as pairs of float32.
    """
    none = top * 0
    zero = none.to(tl.float32)
    stage = tl.where((k > 0) & (k < vocab), none, none + 1)
    mass = (none, none, none, none, none)
    return (
        stage, threshold, none + INT_MAX, none, threshold, top + 1, none, none + 1, none + 1, mass, (zero, zero),
        (zero, zero),
    )  # fmt: skip


@triton.jit
def advance(state, measured, top, k, p, scale, PIVOTS: tl.constexpr):
    """The state after a pass."""
    stage, threshold, ties, excess, low, high, above, by_value, first, mass, goal, total = state
    count, least, most, sums = measured
    m, a0, a1, a2, a3 = mass
    goal_h, goal_l = goal
    total_h, total_l = total
    t, t0, t1, t2, t3 = sums
    t, t0, t1, t2, t3 = masses.carry(m + t, a0 + t0, a1 + t1, a2 + t2, a3 + t3)
    hi, lo = masses.value(t, t0, t1, t2, t3)
    if (stage == 1) & (first == 1):
        # The first pivot is the set's threshold: of the tokens that equal it, `excess` are not in the set.
        total_h = tl.sum(tl.where(tl.arange(0, PIVOTS) == 0, hi, 0.0), axis=0)
        total_l = tl.sum(tl.where(tl.arange(0, PIVOTS) == 0, lo, 0.0), axis=0)
        w_h, w_l = weight_of(threshold, scale)
        out_h, out_l = ds.multiply(w_h, w_l, -excess.to(tl.float32), 0.0)
        total_h, total_l = ds.add(total_h, total_l, out_h, out_l)
        goal_h, goal_l = ds.multiply(total_h, total_l, p, 0.0)
    counted = (above + count >= k).to(tl.int32)
    weighed = (ds.at_least(hi, lo, goal_h, goal_l) & (above + count > 0)).to(tl.int32)
    # With no more than k keys, all are kept. A set as a whole has its goal's mass, whatever the last bit says.
    whole = (stage == 0) & (pick(counted, 0, PIVOTS) == 0)
    reached = tl.where(tl.arange(0, PIVOTS) == 0, 1, tl.where(stage == 0, counted, weighed))
    last = tl.sum(reached, axis=0) - 1
    beyond = last + 1 < PIVOTS
    here = pick(count, last, PIVOTS) - pick(count, last + 1, PIVOTS)
    above += pick(count, last + 1, PIVOTS)
    m = tl.where(beyond, pick(t, last + 1, PIVOTS), m)
    a0 = tl.where(beyond, pick(t0, last + 1, PIVOTS), a0)
    a1 = tl.where(beyond, pick(t1, last + 1, PIVOTS), a1)
    a2 = tl.where(beyond, pick(t2, last + 1, PIVOTS), a2)
    a3 = tl.where(beyond, pick(t3, last + 1, PIVOTS), a3)
    high = tl.where(beyond, pick(most, last + 1, PIVOTS) + 1, high)
    low = pick(least, last, PIVOTS)
    by_value, first = 1 - by_value, first * 0
    found = _span(low, high) <= 1
    if stage == 0:
        if whole | found:
            # Top-p's search begins, among what is kept.
            ties = tl.where(whole, INT_MAX, k - above)
            excess = tl.where(whole, 0, here - ties)
            threshold = tl.where(whole, threshold, low)
            stage, low, high, above = stage + 1, threshold, top + 1, above * 0
            by_value, first = first + 1, first + 1
            m, a0, a1, a2, a3 = m * 0, m * 0, m * 0, m * 0, m * 0
    else:
        if p >= 1.0:
            stage += 1  # the mass was all that was missing
        else:
            if found:
                available = tl.where((low == threshold) & (ties < here), ties, here)
                base_h, base_l = masses.value(m, a0, a1, a2, a3)
                ties, total_h, total_l = _ties(low, available, above, base_h, base_l, goal_h, goal_l, scale)
                threshold = low
                stage += 1
    mass = (m, a0, a1, a2, a3)
    return (
        stage, threshold, ties, excess, low, high, above, by_value, first, mass, (goal_h, goal_l), (total_h, total_l),
    )  # fmt: skip


@triton.jit
def _ties(key, available, above, base_h, base_l, goal_h, goal_l, scale):
    """How many of the `available` tokens of one key reach the goal on top of the base; and their common mass."""
    w_h, w_l = weight_of(key, scale)
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
    out_h, out_l = ds.add(base_h, base_l, out_h, out_l)
    return need, out_h, out_l
