"""Products with so much work that threads take it in parts: every part is done once, whoever does it."""

import pytest
import torch
from amx_emulation import ISAS
from dequant_cases import dequant_arguments
from test_host_int8 import arguments as int8_arguments

from gcu_compile.kernels.host import dequant_gemm, int8_gemm

ROWS, OUTPUTS, INPUTS = 300, 650, 64  # tiles and rows that threads do not divide


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def products():
    for dtype in (torch.bfloat16, torch.float32):
        int4 = dequant_arguments("host_int4", ROWS, OUTPUTS, INPUTS, 2, dtype, zeros=True)
        yield lambda given=int4: dequant_gemm.run(**given)
        int8 = int8_arguments(ROWS, OUTPUTS, INPUTS, dtype)
        yield lambda given=int8: int8_gemm.run(**given)


@pytest.mark.parametrize("isa", ISAS)
def test_any_number_of_threads_gives_the_same(isa, threads, use_isa):
    use_isa(isa)
    for product in products():
        threads(1)
        expected = product()
        for count in (2, 3, 7):
            threads(count)
            assert all(torch.equal(product(), expected) for _ in range(5)), count


def test_experts_with_unequal_rows(threads):
    given = int8_arguments(ROWS, OUTPUTS, INPUTS, torch.bfloat16)
    offsets = torch.tensor([0, 0, 170, 171, 171, ROWS])
    weight, scales = (given[name].unsqueeze(0).repeat(5, *[1] * given[name].dim()) for name in ("weight", "scales"))
    weight.random_(generator=torch.Generator().manual_seed(1))
    threads(1)
    expected = int8_gemm.run_grouped(given["x"], offsets, weight, scales, layout="host_int8")
    for count in (2, 3, 7):
        threads(count)
        found = int8_gemm.run_grouped(given["x"], offsets, weight, scales, layout="host_int8")
        assert torch.equal(found, expected), count
