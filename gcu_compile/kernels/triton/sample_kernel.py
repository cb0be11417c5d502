"""One row of logits -> one token id, without a sort, a scan over the vocabulary or a 64-bit value.

    maximum (and, for a greedy row, its first id)
    -> threshold of top-k, then of top-p, by passes over the row (`thresholds.py`)
    -> how many of the tokens that equal the threshold are kept, by ascending id
    -> one uniform number walks the tiles' weights, then the ids of one tile by halves

The meaning is `sampling/eager.py`. Weights have an error of about 2**-45 (`double_single.exp`) and are summed without
any (`masses.py`). So the kept set is that of float64 unless a goal lies within 2**-43 of a sum of weights, where
float64's own cumulative sum over a vocabulary is off by as much; there, one token more or less may be kept.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds
from gcu_compile.kernels.triton import logits, masses, philox, states, thresholds

LOWEST = thresholds.LOWEST
INT_MAX = thresholds.INT_MAX
INT_MIN = thresholds.INT_MIN
GREEDY = tl.constexpr(1e-5)  # temperatures below are greedy, as in eager.py


@triton.jit
def largest(row, at, start, end, vocab, BLOCK: tl.constexpr):
    """Of ids [start, end): the largest key, its first id, and the smallest key above -inf."""
    top, top_id, bottom = vocab * 0 + INT_MIN, vocab * 0, vocab * 0 + INT_MAX
    for begin in range(start, end, BLOCK):
        z, at = logits.tile(row, at, begin, vocab, BLOCK)
        key = logits.ordered(z)
        largest_here = tl.max(key, axis=0)
        first = tl.min(tl.where(key == largest_here, begin + tl.arange(0, BLOCK), INT_MAX), axis=0)
        top_id = tl.where(largest_here > top, first, top_id)
        top = tl.where(largest_here > top, largest_here, top)
        smallest = tl.min(tl.where(key >= LOWEST, key, INT_MAX), axis=0)
        bottom = tl.where(smallest < bottom, smallest, bottom)
    return top, top_id, bottom


@triton.jit
def wanted(index, temperature_ptr, top_k_ptr, top_p_ptr):
    """Temperature, k and p of a row; 0, 0 and 1 where not given."""
    temperature, k, p = 0.0, 0, 1.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + index)
    if top_k_ptr is not None:
        k = tl.load(top_k_ptr + index)
    if top_p_ptr is not None:
        p = tl.load(top_p_ptr + index)
    return index * 0.0 + temperature, index * 0 + k, index * 0.0 + p


@triton.jit
def floor_of(index, min_p_ptr, bottom, top, scale, PIVOTS: tl.constexpr):
    """The smallest key that min-p keeps, or `bottom`."""
    threshold = bottom
    if min_p_ptr is not None:
        share = tl.load(min_p_ptr + index)
        if share > 0.0:
            maximum, inv0, inv1, inv2 = scale
            least = thresholds.min_p(share, maximum, top, inv0, inv1, inv2, PIVOTS)
            threshold = tl.where(least > bottom, least, bottom)
    return threshold


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
                weights = (w0, w1, w2, w3)
                drawn = start + masses.place(weights, kept, (m, a0, a1, a2, a3), goal_h, goal_l, BLOCK, HALVES)
            m, a0, a1, a2, a3 = n, b0, b1, b2, b3
        start += BLOCK
    return drawn


@triton.jit
def sample_kernel(
    ids_ptr,
    kept_ptr,
    state_ptr,
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

    ids: [rows] int32, written. kept: [rows, vocab] int8, written with the kept set; None but in tests. state: [rows,
    STATE] int32 of `sample_split_kernel.py`, where a search goes on that it began; or None. logits: [rows, vocab]
    float, `stride` elements from row to row. seeds, positions: [rows, 2] int32, low and high words. temperature,
    top_p, min_p, repetition, frequency, presence: [rows] float32. top_k: [rows] int32. forbidden: [rows, vocab] int8.
    Offsets: [rows + 1] int32. Settings may be None. BLOCK = 2**HALVES.
    """
    index = tl.program_id(0)
    at, numbers = logits.numbers_of(
        index, bias_offsets_ptr, bias_ids, history_offsets_ptr, history_ids, repetition_ptr, frequency_ptr, presence_ptr
    )
    row = (
        logits_ptr + index * stride, forbidden_ptr, index * vocab, bias_ids, bias_values, history_ids, history_counts,
        numbers,
    )  # fmt: skip
    kept_row = None
    if kept_ptr is not None:
        kept_row = kept_ptr + index * vocab
    temperature, k, p = wanted(index, temperature_ptr, top_k_ptr, top_p_ptr)
    if state_ptr is not None:
        top, top_id, bottom = states.largest(state_ptr + index * states.STATE)
    else:
        top, top_id, bottom = largest(row, at, 0, vocab, vocab, BLOCK)
    if (top < LOWEST) | (temperature < GREEDY):
        # Nothing left: id 0. Greedy: the first of the largest.
        tl.store(ids_ptr + index, tl.where(top < LOWEST, 0, top_id))
        if kept_row is not None:
            for start in range(0, vocab, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                only = ((ids == top_id) & (top >= LOWEST)).to(tl.int8)
                tl.store(kept_row + start + tl.arange(0, BLOCK), only, mask=ids < vocab)
    else:
        inv0, inv1, inv2 = ds.inverse(temperature)
        scale = (logits.unordered(top), inv0, inv1, inv2)
        if state_ptr is not None:
            state = states.load(state_ptr + index * states.STATE)
        else:
            state = thresholds.begin(floor_of(index, min_p_ptr, bottom, top, scale, PIVOTS), top, k, vocab)
        while state[0] < 2:
            pivots = thresholds.pivots_of(state, PIVOTS)
            measured = thresholds.measure(row, at, 0, vocab, state, pivots, scale, vocab, BLOCK, PIVOTS)
            state = thresholds.advance(state, measured, top, k, p, scale, PIVOTS)
        hi, lo = state[11]
        uh, ul = philox.uniform_of(seeds_ptr, positions_ptr, index, 0)
        goal_h, goal_l = masses.share(hi, lo, uh, ul)
        drawn = _draw(row, at, vocab, state[1], state[2], goal_h, goal_l, kept_row, scale, BLOCK, HALVES)
        tl.store(ids_ptr + index, drawn)


EXACT = True  # a * b + c must round twice


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return constexprs | {"BLOCK": 1024, "HALVES": 10}


def specimens_of(kernel, shared, sizes, grid, numbers=None):
    """Launches for `gcu-compile check` of a kernel on rows of 151936 logits: everything asked for, top-p, a plain draw.

    Args:
        shared: types of the arguments beside the logits and the settings; sizes: constexprs; numbers: of arguments.
    """
    names = kernel.arg_names
    shared = shared | {"logits_ptr": "*bf16", "seeds_ptr": "*i32", "positions_ptr": "*i32"}
    shared |= {"temperature_ptr": "*fp32", "stride": "i32", "vocab": "i32"}
    shared = {name: kind for name, kind in shared.items() if name in names}
    kinds = {"forbidden_ptr": "*i8"}
    kinds |= dict.fromkeys(("top_p_ptr", "min_p_ptr", "bias_values"), "*fp32")
    kinds |= dict.fromkeys(("repetition_ptr", "frequency_ptr", "presence_ptr"), "*fp32")
    kinds |= dict.fromkeys(("top_k_ptr", "bias_offsets_ptr", "bias_ids"), "*i32")
    kinds |= dict.fromkeys(("history_offsets_ptr", "history_ids", "history_counts"), "*i32")
    values = {"stride": 151936, "vocab": 151936} | (numbers or {})
    for label, asked in (("all", kinds), ("top_p", {"top_p_ptr": "*fp32"}), ("plain", {})):
        signature = shared | asked
        absent = {name: None for name in names if name not in signature and name not in sizes}
        yield {"kernel": kernel, "signature": signature, "constexprs": sizes | absent, "grid": grid,
               "num_warps": 4, "num_stages": 3, "values": values, "name": f"{kernel.__name__} {label}"}  # fmt: skip


def _specimens():
    sizes = {"BLOCK": 4096, "PIVOTS": 16, "HALVES": 12}
    return specimens_of(sample_kernel, {"ids_ptr": "*i32"}, sizes, (32,))


LEGALITY_SPECIMENS = list(_specimens())
