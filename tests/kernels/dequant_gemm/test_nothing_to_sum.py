"""Products of no inputs: zeros, or the bias; the first call of a thread among them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from amx_emulation import ISAS

from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.kernels.host import dequant_gemm


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_no_inputs(isa, m, use_isa):
    use_isa(isa)
    form, bias = layouts.get("host_int4"), torch.randn(64)
    weight, scales = torch.zeros(form.shape(64, 0), dtype=form.word), torch.ones(1, 64)
    with ThreadPoolExecutor(1) as pool:
        given = (torch.zeros(m, 0), weight, scales, None, None, bias)
        found = pool.submit(dequant_gemm.run, *given, layout="host_int4").result()
    assert torch.equal(found, bias.expand(m, 64))
