"""The weighted sum over experts against float64, on every instruction set."""

import pytest
import torch

from gcu_compile.kernels.host import build, weighted_sum
from gcu_compile.kernels.tolerance import tolerance

HERE = build.available()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "top_k", "size"), [(1, 1, 1), (7, 3, 513), (33, 8, 1100), (0, 2, 5)])
def test_sums(isa, dtype, tokens, top_k, size, monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(tokens * top_k, 2 * size, generator=generator).to(dtype)[:, :size]
    place = torch.randperm(tokens * top_k, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    assert weighted_sum.refuses(y) is None
    found = weighted_sum.run(y, place, weights)
    expected = (y[place].double().view(tokens, top_k, size) * weights.double().unsqueeze(-1)).sum(1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **tolerance(dtype, top_k, scale=2.0))


def test_what_it_does_not_take():
    assert "int32" in weighted_sum.refuses(torch.zeros(2, 2, dtype=torch.int32))
    assert "meta" in weighted_sum.refuses(torch.zeros(2, 2, device="meta"))
