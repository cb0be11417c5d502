"""The running softmax of attention (Milakov and Gimelshein, 2018; FlashAttention). Device functions.

Rows are queries, columns keys. Scores stay in float32; a row that has seen no key yet has maximum -inf and sum 0.
"""

import triton
import triton.language as tl

MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def tanh(x):
    """tanh to float32's precision: a series near 0, where 1 - 2 / (exp(2x) + 1) cancels."""
    square = x * x
    series = 0.003592128036572481
    series = -0.0088632355299022 + square * series
    series = 0.021869488536155203 + square * series
    series = -0.05396825396825397 + square * series
    series = 0.13333333333333333 + square * series
    near = x + x * square * (-0.3333333333333333 + square * series)
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.35, near, tl.where(x < 0.0, -far, far))


@triton.jit
def capped(scores, SOFT_CAP: tl.constexpr):
    """cap * tanh(score / cap); a cap of 0 leaves scores alone."""
    if SOFT_CAP > 0.0:
        scores = SOFT_CAP * tanh(scores * (1.0 / SOFT_CAP))
    return scores


@triton.jit
def visible(queries, keys, last, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[M, N]: whether the query at position queries[m] sees the key at keys[n]; keys end before `last`."""
    seen = (keys < last)[None, :] & (queries == queries)[:, None]
    if CAUSAL:
        seen = seen & (keys[None, :] <= queries[:, None])
    if WINDOW > 0:
        seen = seen & (keys[None, :] > queries[:, None] - WINDOW)
    return seen


@triton.jit
def step(scores, maximum, total):
    """Take in the scores of more keys, -inf where hidden.

    Returns:
        weights [M, N], the factor [M] of what was summed before, and the new maximum and sum [M].
    """
    new = tl.maximum(maximum, tl.max(scores, axis=1))
    shift = tl.where(new == MINUS_INFINITY, 0.0, new)
    weights = tl.exp(scores - shift[:, None])
    factor = tl.exp(maximum - shift)
    return weights, factor, new, total * factor + tl.sum(weights, axis=1)


@triton.jit
def start(sinks, rows, has_sink):
    """Maximum and sum of rows before any key: those of their sinks where `has_sink`."""
    maximum = tl.where(has_sink, sinks, MINUS_INFINITY)
    total = tl.where(maximum > MINUS_INFINITY, 1.0, 0.0)
    return maximum + rows * 0.0, total
