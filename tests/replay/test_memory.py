"""What lies where: intermediate results that are needed at the same time never overlap."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.replay.memory import LINE, Memory, Place, plan

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.data())
def test_what_is_needed_at_the_same_time_lies_apart(sizes, data):
    spans = [sorted(data.draw(st.tuples(*[st.integers(0, 10)] * 2))) for _ in sizes]
    pinned = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    places = [Place(call, 0, "intermediate", i, 0) for i, span in enumerate(spans) for call in span]
    offsets, total = plan(places, sizes, pinned)
    assert set(offsets) == set(range(len(sizes))) - pinned
    assert all(begin % LINE == 0 and begin + sizes[i] <= total for i, begin in offsets.items())
    for i in offsets:
        for j in offsets:
            together = spans[i][0] <= spans[j][1] and spans[j][0] <= spans[i][1]
            apart = offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]
            assert i == j or apart or not together


def test_one_after_the_other_lie_in_the_same_place():
    places = [Place(call, 0, "intermediate", call // 2, 0) for call in range(6)]
    offsets, total = plan(places, [100, 90, 80], set())
    assert set(offsets.values()) == {0} and total == 100


def test_places_of_other_kinds_take_no_room():
    places = [Place(0, 0, "persistent", 0, 0), Place(0, 1, "input", 0, 0)]
    assert plan(places, [], set()) == ({}, 0)


def test_an_address_is_found_in_the_memory_that_holds_it():
    tensors = [torch.empty(10), torch.empty(0), torch.empty(3, 4)[1:]]
    memory = Memory()
    memory.add("persistent", tensors)
    memory.add("input", tensors)  # known already
    for i in (0, 2):
        storage = tensors[i].untyped_storage()
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        assert memory.find(begin) == memory.find(end - 1) == (begin, "persistent", i)
        assert memory.find(tensors[i].data_ptr()) == (begin, "persistent", i)
    lowest = min(t.untyped_storage().data_ptr() for t in (tensors[0], tensors[2]))
    assert memory.find(lowest - 1) is None
