"""Weights in memory of their own."""

import pytest
import torch

from gcu_compile.kernels.host import pages


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
@pytest.mark.parametrize("size", [(3, 5), (64, 128, 130), (1024, 2049)])
def test_a_copy_is_the_tensor_and_starts_a_page(dtype, size):
    tensor = torch.randint(-128, 128, size, dtype=dtype)
    placed = pages.huge(tensor)
    assert torch.equal(placed, tensor) and placed.is_contiguous() and placed.dtype == dtype
    assert (placed is tensor) == (tensor.nbytes < pages.PAGE)
    assert placed is tensor or placed.data_ptr() % pages.PAGE == 0


def test_a_system_that_refuses_leaves_the_tensor(monkeypatch):
    tensor = torch.zeros(pages.PAGE, dtype=torch.int8)

    def refuse(*args, **kwargs):
        raise OSError("no memory")

    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    assert pages.huge(tensor) is tensor
