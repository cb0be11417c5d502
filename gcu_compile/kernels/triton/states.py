"""The state of a row's search in memory, for passes that several launches share: STATE int32. Device functions."""

import triton
import triton.language as tl

STATE = tl.constexpr(32)


@triton.jit
def _word(words, index):
    return tl.sum(tl.where(tl.arange(0, STATE) == index, words, 0), axis=0)


@triton.jit
def _float(words, index):
    return _word(words, index).to(tl.float32, bitcast=True)


@triton.jit
def largest(row_ptr):
    """The largest key, its first id, and the smallest key above -inf."""
    words = tl.load(row_ptr + tl.arange(0, STATE))
    return _word(words, 18), _word(words, 19), _word(words, 20)


@triton.jit
def load(row_ptr):
    """The state that `store` stored, see `thresholds.begin`."""
    words = tl.load(row_ptr + tl.arange(0, STATE))
    mass = (_word(words, 9), _word(words, 10), _word(words, 11), _word(words, 12), _word(words, 13))
    goal = (_float(words, 14), _float(words, 15))
    total = (_float(words, 16), _float(words, 17))
    return (
        _word(words, 0), _word(words, 1), _word(words, 2), _word(words, 3), _word(words, 4), _word(words, 5),
        _word(words, 6), _word(words, 7), _word(words, 8), mass, goal, total,
    )  # fmt: skip


@triton.jit
def _set(words, index, value):
    return tl.where(tl.arange(0, STATE) == index, value, words)


@triton.jit
def store(row_ptr, state, top, top_id, bottom):
    """Store a state and what `largest` gives, as one slice."""
    stage, threshold, ties, excess, low, high, above, by_value, first, mass, goal, total = state
    words = tl.zeros([STATE], dtype=tl.int32)
    words = _set(_set(_set(words, 0, stage), 1, threshold), 2, ties)
    words = _set(_set(_set(words, 3, excess), 4, low), 5, high)
    words = _set(_set(_set(words, 6, above), 7, by_value), 8, first)
    words = _set(_set(_set(words, 9, mass[0]), 10, mass[1]), 11, mass[2])
    words = _set(_set(words, 12, mass[3]), 13, mass[4])
    words = _set(words, 14, goal[0].to(tl.int32, bitcast=True))
    words = _set(words, 15, goal[1].to(tl.int32, bitcast=True))
    words = _set(words, 16, total[0].to(tl.int32, bitcast=True))
    words = _set(words, 17, total[1].to(tl.int32, bitcast=True))
    words = _set(_set(_set(words, 18, top), 19, top_id), 20, bottom)
    tl.store(row_ptr + tl.arange(0, STATE), words)
