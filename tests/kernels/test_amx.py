"""AMX's tiles are a state of each thread: products of ours and of oneDNN's take turns in the same threads."""

import amx_emulation
import pytest
import torch

from gcu_compile.kernels import attention  # noqa: F401  (registers the operation)
from gcu_compile.kernels.dequant_gemm import layouts

pytestmark = pytest.mark.usefixtures("amx")


def products():
    """name -> a call that uses tiles: two of oneDNN's, and ours."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator).bfloat16()
    linear = torch.nn.Linear(512, 512).bfloat16().requires_grad_(False)
    codes = torch.randint(-128, 128, (512, 512), generator=generator)
    weight, other = layouts.pack(codes, layouts.get("host_int8")), codes.to(torch.int8)
    scales = torch.rand(1, 512, generator=generator) / 1000
    q, k, v = torch.randn(3, 1, 4, 96, 64, generator=generator).bfloat16()
    return {
        "oneDNN bf16": lambda: linear(x),
        "oneDNN int8": lambda: torch._int_mm(other[:64], other),
        "int8_gemm": lambda: torch.ops.gcu.int8_gemm(x, weight, scales, layout="host_int8"),
        "dequant_gemm": lambda: torch.ops.gcu.dequant_gemm(x, weight, scales.bfloat16(), layout="host_int8"),
        "attention": lambda: torch.ops.gcu.attention(q, k, v, scale=0.125, causal=True),
    }


@pytest.mark.skipif(amx_emulation.EMULATED not in amx_emulation.TILED, reason="only emulated instructions are counted")
def test_each_product_of_ours_is_made_of_tiles():
    for name, call in products().items():
        before = amx_emulation.executed()
        call()
        assert (amx_emulation.executed() > before) == ("oneDNN" not in name), name


def test_tiles_of_several_libraries_take_turns():
    calls = products()
    alone = {name: call().clone() for name, call in calls.items()}
    for first in calls:
        for second in calls:
            for name in (first, second, first):
                assert torch.equal(calls[name](), alone[name]), (first, second, name)
