"""A draft token with its draft's probabilities against the target's row: accepted, or another one from what is left.

    maximum -> thresholds (as `sample_kernel`) -> p(draft), q(draft): accepted?
            -> mass of max(p - q, 0) -> one uniform number walks it

The meaning is `sampling/rejection_eager.py`, in float64; here p and p - q have an error of about 2**-44 (pairs of
float32) and are summed without any (`masses.py`).
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds
from gcu_compile.kernels.triton import kept, logits, masses, philox, sample_kernel, thresholds


@triton.jit
def _left(z, chosen, q, scale, inverse_h, inverse_l):
    """Limbs of max(p - q, 0) of a tile, p = weight * inverse where chosen."""
    maximum, inv0, inv1, inv2 = scale
    hi, lo = masses.weight(z, maximum, inv0, inv1, inv2)
    hi, lo = ds.multiply(hi, lo, inverse_h, inverse_l)
    hi, lo = ds.add(hi, lo, -q, 0.0)
    positive = chosen & ((hi > 0.0) | ((hi == 0.0) & (lo > 0.0)))
    return masses.limbs(tl.where(positive, hi, 0.0), tl.where(positive, lo, 0.0))


@triton.jit
def _walk(
    row, at, q_row, vocab, threshold, last, scale, inverse, goal_h, goal_l, BLOCK: tl.constexpr, HALVES: tl.constexpr
):
    """The first id at which the sum of max(p - q, 0), by ascending id, exceeds the goal, or -1; and the whole sum."""
    inverse_h, inverse_l = inverse
    m, drawn, start = vocab * 0, vocab * 0 - 1, vocab * 0
    a0, a1, a2, a3 = m, m, m, m
    while (start < vocab) & (drawn < 0):
        z, at = logits.tile(row, at, start, vocab, BLOCK)
        ids = start + tl.arange(0, BLOCK)
        chosen = kept.chosen(logits.ordered(z), ids, threshold, last)
        if tl.max(chosen.to(tl.int32), axis=0) > 0:
            q = tl.load(q_row + start + tl.arange(0, BLOCK), mask=ids < vocab, other=0.0)
            w0, w1, w2, w3 = _left(z, chosen, q, scale, inverse_h, inverse_l)
            t, t0, t1, t2, t3 = masses.tile_sum(w0, w1, w2, w3, chosen, 0)
            n, b0, b1, b2, b3 = masses.carry(m + t, a0 + t0, a1 + t1, a2 + t2, a3 + t3)
            hi, lo = masses.value(n, b0, b1, b2, b3)
            if ds.at_least(goal_h, goal_l, hi, lo) == 0:
                weights = (w0, w1, w2, w3)
                drawn = start + masses.place(weights, chosen, (m, a0, a1, a2, a3), goal_h, goal_l, BLOCK, HALVES)
            m, a0, a1, a2, a3 = n, b0, b1, b2, b3
        start += BLOCK
    hi, lo = masses.value(m, a0, a1, a2, a3)
    return drawn, hi, lo


@triton.jit
def rejection_kernel(
    found_ptr,
    logits_ptr,
    drafts_ptr,
    q_ptr,
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
    """One program per draft token.

    found: [drafts] int32, written. drafts: [drafts] int32. q: [drafts, vocab] float32. The others as in
    `sample_kernel`.
    """
    index = tl.program_id(0)
    at, numbers = logits.numbers_of(
        index, bias_offsets_ptr, bias_ids, history_offsets_ptr, history_ids, repetition_ptr, frequency_ptr, presence_ptr
    )
    row = (
        logits_ptr + index * stride, forbidden_ptr, index * vocab, bias_ids, bias_values, history_ids, history_counts,
        numbers,
    )  # fmt: skip
    temperature, k, p = sample_kernel.wanted(index, temperature_ptr, top_k_ptr, top_p_ptr)
    top, top_id, bottom = sample_kernel.largest(row, at, 0, vocab, vocab, BLOCK)
    if (top < thresholds.LOWEST) | (temperature < sample_kernel.GREEDY):
        # Nothing left: id 0. Greedy: the first of the largest, whatever the draft thought of it.
        tl.store(found_ptr + index, tl.where(top < thresholds.LOWEST, 0, top_id))
    else:
        inv0, inv1, inv2 = ds.inverse(temperature)
        scale = (logits.unordered(top), inv0, inv1, inv2)
        floor = sample_kernel.floor_of(index, min_p_ptr, bottom, top, scale, PIVOTS)
        state = thresholds.begin(floor, top, k, vocab)
        while state[0] < 2:
            pivots = thresholds.pivots_of(state, PIVOTS)
            measured = thresholds.measure(row, at, 0, vocab, state, pivots, scale, vocab, BLOCK, PIVOTS)
            state = thresholds.advance(state, measured, top, k, p, scale, PIVOTS)
        threshold = state[1]
        last = kept.last_tie(row, at, vocab, threshold, state[2], BLOCK, HALVES)
        inverse_h, inverse_l = ds.reciprocal(state[11][0], state[11][1])
        draft = tl.load(drafts_ptr + index)
        z = kept.logit_of(row, at, vocab, draft, BLOCK)
        key = logits.ordered(z)
        hi, lo = masses.weight(z, logits.unordered(top), inv0, inv1, inv2)
        hi, lo = ds.multiply(hi, lo, inverse_h, inverse_l)
        chosen = kept.chosen(key, draft, threshold, last)
        hi, lo = tl.where(chosen, hi, 0.0), tl.where(chosen, lo, 0.0)
        q_row = q_ptr + index * vocab
        q = tl.load(q_row + draft)
        uh, ul = philox.uniform_of(seeds_ptr, positions_ptr, index, 1)
        goal_h, goal_l = ds.multiply(uh, ul, q, 0.0)
        found = draft
        if (ds.at_least(hi, lo, goal_h, goal_l) == 0) | (q <= 0.0):
            # 2 is more than any mass: the first walk goes to the end and tells the sum; the second one draws.
            goal_h, goal_l = hi * 0.0 + 2.0, lo * 0.0
            uh, ul = philox.uniform_of(seeds_ptr, positions_ptr, index, 0)
            for _ in range(0, 2):
                drawn, hi, lo = _walk(
                    row, at, q_row, vocab, threshold, last, scale, (inverse_h, inverse_l), goal_h, goal_l, BLOCK, HALVES
                )
                found = tl.where(drawn >= 0, drawn, found)
                goal_h, goal_l = masses.share(hi, lo, uh, ul)
        tl.store(found_ptr + index, found)


EXACT = True  # a * b + c must round twice
CONFIG = "sample"  # in configs.yaml


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return sample_kernel.for_cuda(constexprs)


def _specimens():
    """Launches for `gcu-compile check`: everything asked for, and drafts of a plain draw."""
    sizes = {"BLOCK": 4096, "PIVOTS": 16, "HALVES": 12}
    shared = {"found_ptr": "*i32", "drafts_ptr": "*i32", "q_ptr": "*fp32"}
    return sample_kernel.specimens_of(rejection_kernel, shared, sizes, (32,))


LEGALITY_SPECIMENS = list(_specimens())
