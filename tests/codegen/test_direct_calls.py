"""Generated code calls our operations on the CPU past the dispatcher, and reports see them as before."""

import importlib.util

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import gcu_compile
from gcu_compile.debug import shadow
from gcu_compile.kernels import registry
from gcu_compile.kernels.dequant_gemm import layouts

N, K = 70, 64
HAS_PLACE = importlib.util.find_spec("torch._inductor.codegen.custom_extern_kernel_codegen") is not None
CALL = "gcu_direct.int8_gemm(" if HAS_PLACE else "torch.ops.gcu.int8_gemm.default("


def model(x, weight, scales, bias):
    y = torch.ops.gcu.int8_gemm.default(x + 1, weight, scales, bias=bias, layout="host_int8", out_dtype=torch.float32)
    return torch.relu(y)


def arguments():
    weight = layouts.pack(torch.randint(-128, 128, (N, K)), layouts.get("host_int8"))
    return torch.randn(3, K).bfloat16(), weight, torch.rand(1, N), torch.randn(N)


@pytest.fixture(autouse=True)
def alone():
    torch._dynamo.reset()
    yield
    shadow.disable()
    shadow.reset()


def compiled(options=None):
    return torch.compile(model, backend="gcu", fullgraph=True, options={"cache": False, **(options or {})})


def test_the_wrapper_calls_past_the_dispatcher():
    given = arguments()
    expected, before = model(*given), registry.calls["int8_gemm", "host_cpp"]
    with torch.no_grad():
        actual, (code, *_) = run_and_get_code(compiled(), *given)
    assert torch.equal(actual, expected)
    assert code.count(CALL) == 1 and "site=" not in code and "zeros=None" not in code
    assert registry.calls["int8_gemm", "host_cpp"] == before + 1


def test_changed_tensors_reach_the_same_code():
    run = compiled()
    with torch.no_grad():
        for _ in range(3):
            given = arguments()
            for _ in range(2):
                assert torch.equal(run(*given), model(*given))


def test_explain_counts_it_as_hand_written():
    report = gcu_compile.explain(model, *arguments())
    assert ("gcu::int8_gemm", "hand-written", 1) in [(k.name, k.by, k.calls) for k in report.kernels]
    assert report.calls == {"int8_gemm: host_cpp": 1}


def test_the_shadow_check_sees_it_and_where_it_stands():
    with torch.no_grad():
        compiled({"shadow": "eager"})(*arguments())
    (found,) = [one for one in shadow.statistics() if one.op == "int8_gemm"]
    assert (found.calls, found.breaches) == (1, 0) and found.node
