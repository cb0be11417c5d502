"""How the work of a decode step is cut: KV heads stay side by side, and every key of every head is in one item."""

import ctypes
from pathlib import Path

import pytest
import torch

from gcu_compile.kernels.host import build
from gcu_compile.options import resolve

LENS = {
    "one": [4096],
    "eight": [4096] * 8,
    "nine": [4096] * 9,
    "many": [1024] * 64,
    "uneven": [4097, *[4096] * 15, 3, 0],
}


def items(lens, heads, kv_heads, threads):
    """[items, (sequence, first KV head, KV heads, first key, last key, partial)]"""
    library = build.load_source(Path(__file__).with_name("plan.cpp"), "portable", str(resolve().effective_cache_dir()))
    library.plan_items.restype = ctypes.c_int64
    given, found = torch.tensor(lens, dtype=torch.int32), torch.empty(10000, 6, dtype=torch.int64)
    numbers = [ctypes.c_int64(n) for n in (heads, kv_heads, threads)]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (given, found)]
    count = library.plan_items(ctypes.c_int64(len(lens)), pointers[0], *numbers, pointers[1], ctypes.c_int64(10000))
    assert 0 < count < 10000
    return found[:count]


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("heads", [(32, 8), (5, 5), (40, 20), (33, 33), (64, 1)])
@pytest.mark.parametrize("lens", LENS)
def test_every_key_of_every_head_is_in_one_item(lens, heads, threads):
    seen = torch.zeros(len(LENS[lens]), heads[1], max(LENS[lens]), dtype=torch.int8)
    for sequence, head, count, first, last, _ in items(LENS[lens], *heads, threads).tolist():
        seen[sequence, head : head + count, first:last] += 1
    for sequence, length in zip(seen, LENS[lens], strict=True):
        assert (sequence[:, :length] == 1).all() and not sequence[:, length:].any()


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("lens", LENS)
def test_kv_heads_stay_side_by_side(lens, threads):
    found = items(LENS[lens], 32, 8, threads)
    by_itself = (found[:, 2] < 8).sum().item()
    if threads == 1:
        assert by_itself == 0 and len(found) == len(LENS[lens])
    elif lens == "one" and threads == 16:  # no more than 8 parts of 512 keys: their heads are shared out
        assert len(found) >= 16
    else:  # the last items alone are in pieces, of two heads
        assert by_itself <= 4 * threads
        assert len(found) > by_itself or len(LENS[lens]) <= threads


def test_a_head_of_many_rows_is_by_itself():
    assert (items([4096] * 3, 36, 4, 2)[:, 2] == 1).all()  # nine rows of each: they are packed
