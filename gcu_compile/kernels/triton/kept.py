"""The tokens that a chain keeps, for kernels that look at them one by one. Device functions."""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import logits


@triton.jit
def chosen(key, ids, threshold, last):
    """Whether tokens are kept: those above the threshold, and of those that equal it the ids up to `last`."""
    return (key > threshold) | ((key == threshold) & (ids <= last))


@triton.jit
def last_tie(row, at, vocab, threshold, ties, BLOCK: tl.constexpr, HALVES: tl.constexpr):
    """The id of the `ties`-th token that equals the threshold, or `vocab` if there are not more of them."""
    last, start = vocab, vocab * 0
    place = tl.arange(0, BLOCK)
    while start < vocab:
        z, at = logits.tile(row, at, start, vocab, BLOCK)
        tie = logits.ordered(z) == threshold
        equal = tl.sum(tie.to(tl.int32), axis=0)
        if equal >= ties:
            before = vocab * 0
            # The longest prefix with fewer than `ties` of them.
            for halving in tl.static_range(HALVES):
                step = BLOCK >> (halving + 1)
                some = tl.sum((tie & (place < before + step)).to(tl.int32), axis=0)
                before = tl.where(some < ties, before + step, before)
            last = start + before
            start = vocab
        ties -= equal
        start += BLOCK
    return last


@triton.jit
def logit_of(row, at, vocab, token, BLOCK: tl.constexpr):
    """The adjusted logit of one token; -inf if it is not in the vocabulary."""
    start = token // BLOCK * BLOCK
    z, at = logits.tile(row, logits.seek(row, at, start), start, vocab, BLOCK)
    return tl.max(tl.where(start + tl.arange(0, BLOCK) == token, z, logits.MINUS_INFINITY), axis=0)
