"""A tile of one row of logits, adjusted as vLLM does: mask, bias, penalties. Device functions.

The lists of a row are sorted by id, so that a running pointer serves the tiles in ascending order and each entry is
loaded once per pass; entries are matched by comparison, never scattered.
"""

import triton
import triton.language as tl

MINUS_INFINITY = tl.constexpr(float("-inf"))
ENTRIES = tl.constexpr(16)  # list entries compared with a tile at once


@triton.jit
def ordered(z):
    """A float32 as an int32 that sorts the same; -0 and 0 are one number."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def unordered(key):
    """The float32 of an `ordered` number."""
    return tl.where(key < 0, -2147483648 - key, key).to(tl.float32, bitcast=True)


@triton.jit
def _not_nan(z):
    return tl.where(z == z, z, MINUS_INFINITY)


@triton.jit
def skip(ids_ptr, first, last, below):
    """Index of the first entry of [first, last) whose id is at least `below`."""
    at = first
    more = at < last
    while more:
        entries = at + tl.arange(0, ENTRIES)
        ids = tl.load(ids_ptr + at + tl.arange(0, ENTRIES), mask=entries < last, other=2147483647)
        passed = tl.sum((ids < below).to(tl.int32), axis=0)
        at += passed
        more = passed == ENTRIES
    return at


@triton.jit
def _biased(z, offsets, end, at, last, ids_ptr, values_ptr):
    """The tile with its row's biases added, and the index of the next tile's first entry."""
    more = at < last
    while more:
        entries = at + tl.arange(0, ENTRIES)
        there = entries < last
        ids = tl.load(ids_ptr + at + tl.arange(0, ENTRIES), mask=there, other=2147483647)
        values = tl.load(values_ptr + at + tl.arange(0, ENTRIES), mask=there, other=0.0)
        # A bias of -inf times "no match" would be NaN: select before summing.
        hit = ids[:, None] == offsets[None, :]
        z = z + tl.sum(tl.where(hit, values[:, None], 0.0), axis=0)
        passed = tl.sum((ids < end).to(tl.int32), axis=0)
        at += passed
        more = passed == ENTRIES
    return _not_nan(z), at


@triton.jit
def _penalised(z, offsets, end, at, last, ids_ptr, counts_ptr, repetition, frequency, presence):
    """The tile with its row's penalties, and the index of the next tile's first entry."""
    more = at < last
    while more:
        entries = at + tl.arange(0, ENTRIES)
        there = entries < last
        ids = tl.load(ids_ptr + at + tl.arange(0, ENTRIES), mask=there, other=2147483647)
        counts = tl.load(counts_ptr + at + tl.arange(0, ENTRIES), mask=there, other=0)
        hit = ids[:, None] == offsets[None, :]
        seen = tl.max(hit.to(tl.int32), axis=0) > 0
        count = tl.sum(tl.where(hit, counts[:, None], 0), axis=0).to(tl.float32)
        value = tl.where(z > 0, tl.div_rn(z, repetition), z * repetition)
        value = value - frequency * count
        value = value - tl.where(count > 0, presence, 0.0)
        z = tl.where(seen, value, z)
        passed = tl.sum((ids < end).to(tl.int32), axis=0)
        at += passed
        more = passed == ENTRIES
    return z, at


@triton.jit
def tile(row, at, start, vocab, BLOCK: tl.constexpr):
    """Adjusted float32 logits of ids [start, start + BLOCK), -inf beyond the vocabulary; and the next tile's `at`.

    Args:
        row: (logits_ptr of the row, forbidden_ptr of all, the row's first element there, bias_ids, bias_values,
            history_ids, history_counts, numbers of `numbers_of`). What is not wanted is None, at compile time. The
            tuple is made in the kernel: Triton 3.6 has no functions that return None in one.
        at: indices of the tile's first bias and first history entry.
    """
    logits_ptr, forbidden_ptr, first, bias_ids, bias_values, history_ids, history_counts, numbers = row
    bias_last, history_last, repetition, frequency, presence = numbers
    bias_at, history_at = at
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < vocab
    z = tl.load(logits_ptr + start + tl.arange(0, BLOCK), mask=inside, other=MINUS_INFINITY).to(tl.float32)
    z = _not_nan(z)
    if forbidden_ptr is not None:
        forbidden = tl.load(forbidden_ptr + first + start + tl.arange(0, BLOCK), mask=inside, other=0)
        z = tl.where(forbidden != 0, MINUS_INFINITY, z)
    if bias_ids is not None:
        z, bias_at = _biased(z, offsets, start + BLOCK, bias_at, bias_last, bias_ids, bias_values)
    if history_ids is not None:
        z, history_at = _penalised(
            z, offsets, start + BLOCK, history_at, history_last, history_ids, history_counts, repetition, frequency,
            presence,
        )  # fmt: skip
    return z, (bias_at, history_at)


@triton.jit
def numbers_of(
    index,
    bias_offsets_ptr,
    bias_ids,
    history_offsets_ptr,
    history_ids,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
):
    """Of row `index`: where its biases and its history begin, as `at`; where they end, and its penalties."""
    none = index * 0
    bias_at, bias_last, history_at, history_last = none, none, none, none
    repetition, frequency, presence = none * 0.0 + 1.0, none * 0.0, none * 0.0
    if bias_ids is not None:
        bias_at = tl.load(bias_offsets_ptr + index)
        bias_last = tl.load(bias_offsets_ptr + index + 1)
    if history_ids is not None:
        history_at = tl.load(history_offsets_ptr + index)
        history_last = tl.load(history_offsets_ptr + index + 1)
        repetition = tl.load(repetition_ptr + index)
        frequency = tl.load(frequency_ptr + index)
        presence = tl.load(presence_ptr + index)
    return (bias_at, history_at), (bias_last, history_last, repetition, frequency, presence)


@triton.jit
def seek(row, at, start):
    """The indices of the row's first entries from id `start` on."""
    logits_ptr, forbidden_ptr, first, bias_ids, bias_values, history_ids, history_counts, numbers = row
    bias_last, history_last, repetition, frequency, presence = numbers
    bias_at, history_at = at
    if bias_ids is not None:
        bias_at = skip(bias_ids, bias_at, bias_last, start)
    if history_ids is not None:
        history_at = skip(history_ids, history_at, history_last, start)
    return bias_at, history_at
