"""Memory of the emulated card: counted, limited, and taken from the profile."""

import gc

import pytest
import torch
from emulated import CARD_BYTES, on_card


def used(index=0):
    gc.collect()  # what earlier tests left in cycles goes now, not between two readings
    return torch.gcu.memory_allocated(index)


@on_card
def test_allocations_are_counted_in_granules():
    before = used()
    x = torch.empty(1, device="gcu")
    assert used() - before == 512
    y = x.expand(1000)
    assert used() - before == 512
    z = y + 1  # made by a CPU kernel, and counted all the same
    assert used() - before == 512 + 4096
    del x, y, z
    assert used() == before and used(1) == 0


@on_card
def test_peak_and_statistics():
    before = used()
    torch.gcu.reset_peak_memory_stats()
    torch.empty(1 << 20, device="gcu")
    assert torch.gcu.max_memory_allocated() - before == 4 << 20
    torch.gcu.reset_peak_memory_stats()
    assert torch.gcu.max_memory_allocated() == before
    stats = torch.gcu.memory_stats()
    assert stats["allocated_bytes.all.current"] == before == stats["reserved_bytes.all.current"]
    torch.gcu.empty_cache()


@on_card
def test_the_limit_is_the_profiles():
    free, total = torch.gcu.mem_get_info()
    assert total == CARD_BYTES == torch.gcu.get_device_properties().total_memory
    ooms = torch.gcu.memory_stats()["num_ooms"]
    with pytest.raises(torch.gcu.OutOfMemoryError, match="GCU out of memory.*dram_bytes of the target profile"):
        torch.empty(free + 512, dtype=torch.uint8, device="gcu")
    assert torch.gcu.memory_stats()["num_ooms"] == ooms + 1
    assert torch.gcu.mem_get_info()[0] == free
    most = torch.empty(free, dtype=torch.uint8, device="gcu")
    assert torch.gcu.mem_get_info()[0] == 0
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1, device="gcu") + 1
    torch.ones(1, device="gcu:1")  # the other card's memory is its own
    del most
    assert torch.gcu.mem_get_info()[0] == free


@on_card
def test_a_resized_tensor_is_counted_at_its_new_size():
    before = used()
    x = torch.empty(128, device="gcu")
    x.resize_(1024)
    assert used() - before == 4096
    del x
    assert used() == before
