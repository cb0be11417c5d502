"""Rows of several sequences or experts in one launch: which segment a program's block of rows belongs to."""

import triton
import triton.language as tl


@triton.jit
def find(starts_ptr, count, block, BLOCK: tl.constexpr, PAD: tl.constexpr):
    """The segment of block number `block`: its index, first row, end, and the block's number within it.

    Segment i has the rows [starts[i], starts[i + 1]) and its blocks from starts[i] // BLOCK + i on: that leaves room
    for one block per segment that is not full, so rows // BLOCK + count programs serve any lengths. A block at or
    beyond the segment's end has nothing to do.

    Args:
        starts_ptr: [count + 1] int32.
        PAD: count rounded up to a power of two.
    """
    at = tl.arange(0, PAD)
    starts = tl.load(starts_ptr + at, mask=at < count, other=0)
    firsts = tl.where(at < count, starts // BLOCK + at, 2147483647)
    index = tl.sum((firsts <= block).to(tl.int32), axis=0) - 1
    # Addresses are validated even where nothing is read: no segment before the first.
    index = tl.where(index < 0, 0, index)
    begin = tl.sum(tl.where(at == index, starts, 0), axis=0)
    first = tl.sum(tl.where(at == index, firsts, 0), axis=0)
    return index, begin, tl.load(starts_ptr + index + 1), block - first
