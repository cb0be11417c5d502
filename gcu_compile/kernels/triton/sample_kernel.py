"""One row of logits -> one token id, without a sort, a scan over the vocabulary or a 64-bit value.

    maximum (and, for a greedy row, its first id)
    -> threshold of top-k, then of top-p: each pass over the row counts, or weighs, from 16 pivots on at once, and
       shrinks the interval between the last pivot that reaches the goal and the first that does not
    -> how many of the tokens that equal the threshold are kept, by ascending id
    -> one uniform number walks the tiles' weights, then the ids of one tile by halves

The meaning is `sampling/eager.py`. Weights have an error of about 2**-45 (`double_single.exp`) and are summed without
any (`masses.py`). So the kept set is that of float64 unless a goal lies within 2**-43 of a sum of weights, where
float64's own cumulative sum over a vocabulary is off by as much; there, one token more or less may be kept.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds
from gcu_compile.kernels.triton import logits, masses, philox

LOWEST = tl.constexpr(-2139095039)  # ordered(-FLT_MAX): -inf is below
INT_MAX = tl.constexpr(2147483647)
INT_MIN = tl.constexpr(-2147483648)
GREEDY = tl.constexpr(1e-5)  # temperatures below are greedy, as in eager.py


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
def _min_p_floor(min_p, maximum, top, inv0, inv1, inv2, PIVOTS: tl.constexpr):
    """The smallest key whose weight is at least min_p; `top` is the maximum's key."""
    low, high = top * 0 + LOWEST, top + 1
    # Every round divides the interval by PIVOTS = 16; keys have 32 bits.
    for _ in range(9):
        j = tl.arange(0, PIVOTS)
        step = (_span(low, high) // PIVOTS).to(tl.int32, bitcast=True)
        keys = low + j * tl.where(step == 0, 1, step)
        keys = tl.where(keys >= high, high - 1, keys)
        hi, lo = masses.weight(logits.unordered(keys), maximum, inv0, inv1, inv2)
        below = tl.sum(tl.where(ds.at_least(hi, lo, min_p, 0.0), 0, 1), axis=0)
        # The floor lies above the last key that is too light, and not above the first that is not.
        new_high = tl.where(below < PIVOTS, _pick(keys, below, PIVOTS) + 1, high)
        low = tl.where(below > 0, _pick(keys, below - 1, PIVOTS) + 1, low)
        low = tl.where(low > top, top, low)
        high = tl.where(below == 0, low + 1, new_high)
    return low


@triton.jit
def _largest(row, at, vocab, BLOCK: tl.constexpr):
    """The largest key, its first id, and the smallest key above -inf."""
    top, top_id, bottom = vocab * 0 + INT_MIN, vocab * 0, vocab * 0 + INT_MAX
    for start in range(0, vocab, BLOCK):
        z, at = logits.tile(row, at, start, vocab, BLOCK)
        key = logits.ordered(z)
        largest = tl.max(key, axis=0)
        first = tl.min(tl.where(key == largest, start + tl.arange(0, BLOCK), INT_MAX), axis=0)
        top_id = tl.where(largest > top, first, top_id)
        top = tl.where(largest > top, largest, top)
        smallest = tl.min(tl.where(key >= LOWEST, key, INT_MAX), axis=0)
        bottom = tl.where(smallest < bottom, smallest, bottom)
    return top, top_id, bottom


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
def _weight_of(key, scale):
    """Weight of one key as its limbs make it, a pair."""
    maximum, inv0, inv1, inv2 = scale
    hi, lo = masses.weight(logits.unordered(key), maximum, inv0, inv1, inv2)
    w0, w1, w2, w3 = masses.limbs(hi, lo)
    m, w0, w1, w2, w3 = masses.carry(w0 * 0, w0, w1, w2, w3)
    return masses.value(m, w0, w1, w2, w3)


@triton.jit
def _top_k(row, at, vocab, threshold, top, k, scale, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
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
def _top_p(row, at, vocab, threshold, ties, excess, top, p, scale, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """The threshold of the shortest prefix of the kept set that has the share p of its mass.

    Args:
        threshold, ties, excess: of the set so far, of `_top_k`.

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
            w_h, w_l = _weight_of(threshold, scale)
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
    w_h, w_l = _weight_of(low, scale)
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


@triton.jit
def _mass_of(row, at, vocab, threshold, ties, scale, BLOCK: tl.constexpr):
    """Mass of the kept set as a pair."""
    maximum, inv0, inv1, inv2 = scale
    m, equal = vocab * 0, vocab * 0
    a0, a1, a2, a3 = m, m, m, m
    for start in range(0, vocab, BLOCK):
        z, at = logits.tile(row, at, start, vocab, BLOCK)
        key = logits.ordered(z)
        hi, lo = masses.weight(z, maximum, inv0, inv1, inv2)
        w0, w1, w2, w3 = masses.limbs(hi, lo)
        t, t0, t1, t2, t3 = masses.tile_sum(w0, w1, w2, w3, key > threshold, 0)
        m, a0, a1, a2, a3 = masses.carry(m + t, a0 + t0, a1 + t1, a2 + t2, a3 + t3)
        equal += tl.sum((key == threshold).to(tl.int32), axis=0)
    kept = tl.where(ties < equal, ties, equal)
    hi, lo = masses.value(m, a0, a1, a2, a3)
    w_h, w_l = _weight_of(threshold, scale)
    w_h, w_l = ds.multiply(w_h, w_l, kept.to(tl.float32), 0.0)
    return ds.add(hi, lo, w_h, w_l)


@triton.jit
def _draw(row, at, vocab, threshold, ties, goal_h, goal_l, kept_ptr, scale, BLOCK: tl.constexpr, HALVES: tl.constexpr):
    """The first kept id at which the sum of weights, by ascending id, exceeds the goal."""
    maximum, inv0, inv1, inv2 = scale
    m, drawn, start = vocab * 0, vocab * 0 - 1, vocab * 0
    a0, a1, a2, a3 = m, m, m, m
    place = tl.arange(0, BLOCK)
    while (start < vocab) & ((drawn < 0) | (kept_ptr is not None)):
        z, at = logits.tile(row, at, start, vocab, BLOCK)
        key = logits.ordered(z)
        tie = key == threshold
        equal = tl.sum(tie.to(tl.int32), axis=0)
        cut = vocab * 0 + BLOCK  # ties at places below are kept
        if equal > ties:
            cut = vocab * 0
            # The longest prefix with at most `ties` of them.
            for halving in tl.static_range(HALVES):
                step = BLOCK >> (halving + 1)
                before = tl.sum((tie & (place < cut + step)).to(tl.int32), axis=0)
                cut = tl.where(before <= ties, cut + step, cut)
        kept = (key > threshold) | (tie & (place < cut))
        ties = tl.where(equal > ties, 0, ties - equal)
        if kept_ptr is not None:
            tl.store(kept_ptr + start + tl.arange(0, BLOCK), kept.to(tl.int8), mask=start + place < vocab)
        if (tl.max(kept.to(tl.int32), axis=0) > 0) & (drawn < 0):
            hi, lo = masses.weight(z, maximum, inv0, inv1, inv2)
            w0, w1, w2, w3 = masses.limbs(hi, lo)
            t, t0, t1, t2, t3 = masses.tile_sum(w0, w1, w2, w3, kept, 0)
            n, b0, b1, b2, b3 = masses.carry(m + t, a0 + t0, a1 + t1, a2 + t2, a3 + t3)
            hi, lo = masses.value(n, b0, b1, b2, b3)
            if ds.at_least(goal_h, goal_l, hi, lo) == 0:
                below = vocab * 0  # the longest prefix that does not exceed the goal
                for halving in tl.static_range(HALVES):
                    step = BLOCK >> (halving + 1)
                    t, t0, t1, t2, t3 = masses.tile_sum(w0, w1, w2, w3, kept & (place < below + step), 0)
                    t, t0, t1, t2, t3 = masses.carry(m + t, a0 + t0, a1 + t1, a2 + t2, a3 + t3)
                    hi, lo = masses.value(t, t0, t1, t2, t3)
                    below = tl.where(ds.at_least(goal_h, goal_l, hi, lo), below + step, below)
                drawn = start + below
            m, a0, a1, a2, a3 = n, b0, b1, b2, b3
        start += BLOCK
    return drawn


@triton.jit
def sample_kernel(
    ids_ptr,
    kept_ptr,
    logits_ptr,
    seeds_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    forbidden_ptr,
    bias_offsets_ptr,
    bias_ids,
    bias_values,
    history_offsets_ptr,
    history_ids,
    history_counts,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    stride,
    vocab,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """One program per row.

    ids: [rows] int32, written. kept: [rows, vocab] int8, written with the kept set; None but in tests. logits:
    [rows, vocab] float, `stride` elements from row to row. seeds, positions: [rows, 2] int32, low and high words.
    temperature, top_p, min_p, repetition, frequency, presence: [rows] float32. top_k: [rows] int32. forbidden:
    [rows, vocab] int8. Offsets: [rows + 1] int32. Settings may be None. BLOCK = 2**HALVES.
    """
    index = tl.program_id(0)
    logits_ptr += index * stride
    forbidden, bias, history = None, None, None
    bias_at, history_at = 0, 0
    if forbidden_ptr is not None:
        forbidden = forbidden_ptr + index * vocab
    if bias_ids is not None:
        bias_at = tl.load(bias_offsets_ptr + index)
        bias = (tl.load(bias_offsets_ptr + index + 1), bias_ids, bias_values)
    if history_ids is not None:
        history_at = tl.load(history_offsets_ptr + index)
        history = (
            tl.load(history_offsets_ptr + index + 1),
            history_ids,
            history_counts,
            tl.load(repetition_ptr + index),
            tl.load(frequency_ptr + index),
            tl.load(presence_ptr + index),
        )
    kept_row = None
    if kept_ptr is not None:
        kept_row = kept_ptr + index * vocab
    row, at = (logits_ptr, forbidden, bias, history), (bias_at, history_at)

    top, top_id, bottom = _largest(row, at, vocab, BLOCK)
    temperature = 0.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + index)
    if (top < LOWEST) | (temperature < GREEDY):
        # Nothing left: id 0. Greedy: the first of the largest.
        tl.store(ids_ptr + index, tl.where(top < LOWEST, 0, top_id))
        if kept_row is not None:
            for start in range(0, vocab, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                only = ((ids == top_id) & (top >= LOWEST)).to(tl.int8)
                tl.store(kept_row + start + tl.arange(0, BLOCK), only, mask=ids < vocab)
    else:
        maximum = logits.unordered(top)
        inv0, inv1, inv2 = ds.inverse(temperature)
        scale = (maximum, inv0, inv1, inv2)
        # Kept so far: keys above `threshold`, and of those that equal it the first `ties` by id.
        threshold, ties, excess = bottom, vocab * 0 + INT_MAX, vocab * 0
        if min_p_ptr is not None:
            min_p = tl.load(min_p_ptr + index)
            if min_p > 0.0:
                least = _min_p_floor(min_p, maximum, top, inv0, inv1, inv2, PIVOTS)
                threshold = tl.where(least > bottom, least, bottom)
        if top_k_ptr is not None:
            k = tl.load(top_k_ptr + index)
            if (k > 0) & (k < vocab):
                threshold, ties, excess = _top_k(row, at, vocab, threshold, top, k, scale, BLOCK, PIVOTS)
        p = 1.0
        if top_p_ptr is not None:
            p = tl.load(top_p_ptr + index)
        if p < 1.0:
            threshold, ties, hi, lo = _top_p(row, at, vocab, threshold, ties, excess, top, p, scale, BLOCK, PIVOTS)
        else:
            hi, lo = _mass_of(row, at, vocab, threshold, ties, scale, BLOCK)
        seed, position = seeds_ptr + 2 * index, positions_ptr + 2 * index
        uh, ul = philox.uniform(
            tl.load(seed).to(tl.uint32, bitcast=True),
            tl.load(seed + 1).to(tl.uint32, bitcast=True),
            tl.load(position).to(tl.uint32, bitcast=True),
            tl.load(position + 1).to(tl.uint32, bitcast=True),
        )
        goal_h, goal_l = ds.multiply(hi, lo, uh, ul)
        # Rounding must not lift the goal to the whole mass.
        below = lo - hi * 1.4210854715202004e-14
        full = ds.at_least(goal_h, goal_l, hi, below)
        goal_h, goal_l = tl.where(full, hi, goal_h), tl.where(full, below, goal_l)
        tl.store(
            ids_ptr + index, _draw(row, at, vocab, threshold, ties, goal_h, goal_l, kept_row, scale, BLOCK, HALVES)
        )


EXACT = True  # a * b + c must round twice


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return constexprs | {"BLOCK": 1024, "HALVES": 10}


def _specimens():
    """Launches for `gcu-compile check`: everything asked for, and a plain draw."""
    names = sample_kernel.arg_names
    shared = {"ids_ptr": "*i32", "logits_ptr": "*bf16", "seeds_ptr": "*i32", "positions_ptr": "*i32"}
    shared |= {"temperature_ptr": "*fp32", "stride": "i32", "vocab": "i32"}
    kinds = {"forbidden_ptr": "*i8"}
    kinds |= dict.fromkeys(("top_p_ptr", "min_p_ptr", "bias_values"), "*fp32")
    kinds |= dict.fromkeys(("repetition_ptr", "frequency_ptr", "presence_ptr"), "*fp32")
    kinds |= dict.fromkeys(("top_k_ptr", "bias_offsets_ptr", "bias_ids"), "*i32")
    kinds |= dict.fromkeys(("history_offsets_ptr", "history_ids", "history_counts"), "*i32")
    sizes = {"BLOCK": 4096, "PIVOTS": 16, "HALVES": 12}
    values = {"stride": 151936, "vocab": 151936}
    for label, asked in (("all", kinds), ("top_p", {"top_p_ptr": "*fp32"}), ("plain", {})):
        signature = shared | asked
        absent = {name: None for name in names if name not in signature and name not in sizes}
        yield {"kernel": sample_kernel, "signature": signature, "constexprs": sizes | absent, "grid": (32,),
               "num_warps": 4, "num_stages": 3, "values": values, "name": f"sample_kernel {label}"}  # fmt: skip


LEGALITY_SPECIMENS = list(_specimens())
