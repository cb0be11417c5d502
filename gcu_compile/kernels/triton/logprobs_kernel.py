"""Scores of given tokens and of the best of a row, and the first given one's rank, without a sort.

    maximum -> thresholds and mass of what the chain keeps (as `sample_kernel`)
            -> each given token, from its tile -> its rank, one pass -> each of the best: the next in order, one pass

The meaning is `sampling/logprobs_eager.py`.
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds
from gcu_compile.kernels.triton import kept, logits, sample_kernel, thresholds

CUT = tl.constexpr(-2139095040)  # ordered(-inf): what the chain cut stands behind, by id


@triton.jit
def _score(z, maximum, temperature, log_mass, NORMALISED: tl.constexpr):
    """Of a kept token with logit z."""
    if NORMALISED:
        distance = tl.where(z == maximum, 0.0, tl.div_rn(z - maximum, temperature))
        score = distance - log_mass
    else:
        score = tl.div_rn(z, temperature)
    return score


@triton.jit
def _rank(row, at, vocab, key, threshold, last, BLOCK: tl.constexpr):
    """How many kept tokens are not below `key`."""
    rank = vocab * 0
    for start in range(0, vocab, BLOCK):
        z, at = logits.tile(row, at, start, vocab, BLOCK)
        keys = logits.ordered(z)
        above = kept.chosen(keys, start + tl.arange(0, BLOCK), threshold, last) & (keys >= key)
        rank += tl.sum(above.to(tl.int32), axis=0)
    return rank


@triton.jit
def _next(row, at, vocab, key, token, threshold, last, BLOCK: tl.constexpr):
    """Key and id of the token that comes after (key, token): by descending key, then by ascending id."""
    best, best_id = vocab * 0 + thresholds.INT_MIN, vocab * 0
    for start in range(0, vocab, BLOCK):
        z, at = logits.tile(row, at, start, vocab, BLOCK)
        ids = start + tl.arange(0, BLOCK)
        keys = logits.ordered(z)
        shown = tl.where(kept.chosen(keys, ids, threshold, last), keys, CUT)
        behind = (ids < vocab) & ((shown < key) | ((shown == key) & (ids > token)))
        shown = tl.where(behind, shown, thresholds.INT_MIN)
        here = tl.max(shown, axis=0)
        first = tl.min(tl.where(shown == here, ids, thresholds.INT_MAX), axis=0)
        best_id = tl.where(here > best, first, best_id)
        best = tl.where(here > best, here, best)
    return best, best_id


@triton.jit
def logprobs_kernel(
    ids_ptr,
    scores_ptr,
    ranks_ptr,
    logits_ptr,
    tokens_ptr,
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
    given,
    count,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """One program per row.

    ids, scores: [rows, given + count] int32 and float32, written. ranks: [rows] int32, written. tokens: [rows, given]
    int32. The others as in `sample_kernel`.
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
    temperature = tl.where(temperature < sample_kernel.GREEDY, 1.0, temperature)
    top, top_id, bottom = sample_kernel.largest(row, at, 0, vocab, vocab, BLOCK)
    maximum = logits.unordered(top)
    threshold, last, log_mass = top * 0 + thresholds.INT_MAX, top * 0, temperature * 0.0  # nothing is kept
    if top >= thresholds.LOWEST:
        inv0, inv1, inv2 = ds.inverse(temperature)
        scale = (maximum, inv0, inv1, inv2)
        floor = sample_kernel.floor_of(index, min_p_ptr, bottom, top, scale, PIVOTS)
        state = thresholds.begin(floor, top, k, vocab)
        while state[0] < 2:
            pivots = thresholds.pivots_of(state, PIVOTS)
            measured = thresholds.measure(row, at, 0, vocab, state, pivots, scale, vocab, BLOCK, PIVOTS)
            state = thresholds.advance(state, measured, top, k, p, scale, PIVOTS)
        threshold = state[1]
        last = kept.last_tie(row, at, vocab, threshold, state[2], BLOCK, HALVES)
        log_mass = tl.log(state[11][0])
    out = index * (given + count)
    for j in range(0, given):
        token = tl.load(tokens_ptr + index * given + j)
        z = kept.logit_of(row, at, vocab, token, BLOCK)
        key = logits.ordered(z)
        there = kept.chosen(key, token, threshold, last)
        score = _score(z, maximum, temperature, log_mass, NORMALISED)
        tl.store(ids_ptr + out + j, token)
        tl.store(scores_ptr + out + j, tl.where(there, score, logits.MINUS_INFINITY))
        if j == 0:
            rank = vocab
            if there:
                rank = _rank(row, at, vocab, key, threshold, last, BLOCK)
            tl.store(ranks_ptr + index, rank)
    key, token = top * 0 + thresholds.INT_MAX, top * 0 - 1
    for j in range(0, count):
        key, token = _next(row, at, vocab, key, token, threshold, last, BLOCK)
        score = _score(logits.unordered(key), maximum, temperature, log_mass, NORMALISED)
        tl.store(ids_ptr + out + given + j, token)
        tl.store(scores_ptr + out + given + j, tl.where(key > CUT, score, logits.MINUS_INFINITY))


EXACT = True  # a * b + c must round twice
CONFIG = "sample"  # in configs.yaml


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return sample_kernel.for_cuda(constexprs)


def _specimens():
    """Launches for `gcu-compile check`: everything asked for, and raw log-probabilities."""
    sizes = {"BLOCK": 4096, "PIVOTS": 16, "HALVES": 12, "NORMALISED": True}
    shared = {"ids_ptr": "*i32", "scores_ptr": "*fp32", "ranks_ptr": "*i32", "tokens_ptr": "*i32"}
    shared |= {"given": "i32", "count": "i32"}
    return sample_kernel.specimens_of(logprobs_kernel, shared, sizes, (32,), {"given": 1, "count": 20})


LEGALITY_SPECIMENS = list(_specimens())
