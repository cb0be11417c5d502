"""A block of the cache holds all that its tokens need: copied, moved to another cache and back, it reads the same."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.vllm
HEADS, KV_HEADS, SIZE, SLOTS, BLOCKS = 6, 2, 32, 16, 12
LENGTHS = (39, 5, 16)  # of three sequences: blocks that are part full, and one that is full to its end
TABLE = torch.tensor([[7, 0, 3], [4, 0, 0], [9, 0, 0]], dtype=torch.int32)


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def filled(request):
    """(implementation, cache, query): the cache holds the keys and values of all sequences, written by our backend."""
    from vllm_integration.attention import INT8, SCALE_BYTES, GcuAttentionImpl

    int8 = request.param == "int8"
    dtype = torch.float32 if int8 else getattr(torch, request.param)
    shape = (BLOCKS, KV_HEADS, SLOTS, 2 * SIZE + int8 * SCALE_BYTES)
    cache = torch.zeros(shape, dtype=torch.int8 if int8 else dtype)
    impl = GcuAttentionImpl(HEADS, SIZE, SIZE**-0.5, KV_HEADS, None, None, INT8 if int8 else "auto")
    make = torch.Generator().manual_seed(1)
    k, v = (torch.randn(sum(LENGTHS), KV_HEADS, SIZE, generator=make).to(dtype) for _ in "kv")
    slots = [int(TABLE[i, t // SLOTS]) * SLOTS + t % SLOTS for i, n in enumerate(LENGTHS) for t in range(n)]
    query = torch.randn(sum(LENGTHS), HEADS, SIZE, generator=make).to(dtype)
    attend(impl, cache, query, TABLE, LENGTHS, k, v, slots)
    return impl, cache, query[[LENGTHS[0] - 1, LENGTHS[0] + LENGTHS[1] - 1, sum(LENGTHS) - 1]]


def attend(impl, cache, query, table, queries, k=None, v=None, slots=()):
    """One step of `queries` new tokens each; keys and values are written only where they are given."""
    from vllm_integration.attention import Metadata

    starts, lengths = torch.tensor([0, *queries]).cumsum(0).int(), torch.tensor(LENGTHS, dtype=torch.int32)
    step = Metadata(starts, lengths, table, torch.tensor(slots, dtype=torch.int64), True)
    layer = SimpleNamespace(head_size=SIZE, head_size_v=SIZE)
    return impl.forward(layer, query, k, v, cache, step, torch.full_like(query, torch.nan))


def decode(impl, cache, query, table):
    return attend(impl, cache, query, table, (1, 1, 1))


def test_a_copied_block_reads_as_its_source(filled):
    """Copy on write of a shared block: the first sequence goes on in copies, and its old blocks are used again."""
    impl, cache, query = filled
    before = decode(impl, cache, query, TABLE)
    table = TABLE.clone()
    table[0] = torch.tensor([11, 2, 1])
    cache[[11, 2, 1]] = cache[[7, 0, 3]]
    cache[[7, 3]] = 1
    assert torch.equal(decode(impl, cache, query, table), before)
    assert not torch.equal(decode(impl, cache, query, TABLE)[0], before[0])  # near miss: what the old blocks hold now


def test_swapped_out_and_in_at_other_places(filled):
    """To a cache of another size, as host memory is beside a card's, and back into blocks that others used since."""
    impl, cache, query = filled
    before = decode(impl, cache, query, TABLE)
    held = torch.empty((5, *cache.shape[1:]), dtype=cache.dtype)
    held[[4, 0, 2, 1, 3]] = cache[[7, 0, 3, 4, 9]]
    cache.fill_(3)
    cache[[1, 5, 6, 10, 8]] = held[[4, 0, 2, 1, 3]]
    table = torch.tensor([[1, 5, 6], [10, 0, 0], [8, 0, 0]], dtype=torch.int32)
    assert torch.equal(decode(impl, cache, query, table), before)


def test_a_page_is_its_bytes(filled):
    """What moves blocks between processes and files moves bytes: a page of all heads is one contiguous piece."""
    impl, cache, query = filled
    before = decode(impl, cache, query, TABLE)
    files = [bytes(page.view(torch.uint8).numpy()) for page in cache]
    other = torch.empty_like(cache)
    for page, file in zip(other, files, strict=True):
        assert page.is_contiguous()
        page.copy_(torch.frombuffer(bytearray(file), dtype=cache.dtype).view(page.shape))
    assert torch.equal(decode(impl, other, query, TABLE), before)
