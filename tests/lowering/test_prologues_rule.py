"""A norm or gated activation with its quantisation becomes one operation, if asked for; a near miss says why not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowered import lowered, statuses

import gcu_compile
from gcu_compile.kernels.dequant_gemm.eager import quantize
from gcu_compile.kernels.tolerance import tolerance

RULES = ["rms_norm_quant", "silu_mul_quant"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def by_division(y):
    scale = y.float().abs().amax(-1, keepdim=True) / 127
    return (y.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


def by_reciprocal(y):
    scale = y.float().abs().max(-1, keepdim=True).values * (1 / 127)
    return (y.float() * scale.reciprocal()).round().clamp(-127, 127).to(torch.int8), scale


def unclamped(y):
    scale = y.float().abs().amax(-1) / 127
    return (y.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


QUANTISED = {
    "division": by_division,
    "reciprocal": by_reciprocal,
    "unclamped": unclamped,
    "ours": lambda y: quantize(y)[:2],
}


def hugging_face(s, weight):
    wide = s.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(s.dtype)


def vllm(s, weight):
    wide = s.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).to(s.dtype) * weight


def gemma(s, weight):
    wide = s.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + weight.float())).to(s.dtype)


NORMS = {"hugging face": hugging_face, "vllm": vllm, "gemma": gemma}
GATES = {
    "chunk": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "slices": lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],
    "turned": lambda x: F.silu(x[..., x.shape[-1] // 2 :]) * x[..., : x.shape[-1] // 2],
    "sigmoid": lambda x: x.chunk(2, -1)[0] * torch.sigmoid(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


def norm(spelling, quantised, residual):
    """(function that returns codes, scales, the sum, and what is quantised; the number of its inputs)"""

    def fn(x, weight, *other):
        s = x + other[0] if residual else x
        y = NORMS[spelling](s, weight)
        return (*QUANTISED[quantised](y), s * 1, y)

    return fn


def gate(spelling, quantised):
    def fn(x):
        y = GATES[spelling](x)
        return (*QUANTISED[quantised](y), y)

    return fn


def held(fn, args, dtype, symbolic=False, enabled=RULES):
    """Lower `fn`, whose last result is what it quantises, and hold codes and scales against that in float64."""
    gm, report = lowered(lambda *a: fn(*a)[:-1], *args, symbolic=symbolic, dims=(0,), enable_rules=enabled)
    codes, scales, *rest = gm(*args)
    wide = [arg.double() for arg in args]
    *kept, exact = fn(*wide)
    plain = fn(*args)
    assert codes.dtype == torch.int8 and codes.shape == plain[0].shape
    assert scales.dtype == plain[1].dtype and scales.shape == plain[1].shape
    exact = exact.reshape(-1, exact.shape[-1])
    meant = exact.abs().amax(-1, keepdim=True) / 127
    allowed = tolerance(dtype, exact.shape[-1])["rtol"]
    found = scales.reshape(-1, 1).double()
    torch.testing.assert_close(found, meant, rtol=allowed, atol=allowed * 1e-3)
    # Half a step of rounding, and what the way to it may be off.
    difference = (codes.reshape(exact.shape).double() * found - exact).abs()
    assert (difference <= meant * (0.5 + 127 * allowed) + allowed * 1e-3).all()
    for one, expected in zip(rest, kept[2:], strict=True):
        torch.testing.assert_close(one.double(), expected, **tolerance(dtype, 2))
    return report


def data(rows, size, dtype, residual=False):
    """Rows, a weight, and rows to add."""
    torch.manual_seed(size)
    x, other = torch.randn(2, *rows, size) * 2
    return [one.to(dtype) for one in (x, torch.rand(size) + 0.5, *([other] if residual else []))]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.parametrize("spelling", NORMS)
def test_a_norm(spelling, quantised, dtype):
    for residual in (False, True):
        report = held(norm(spelling, quantised, residual), data((5,), 48, dtype, residual), dtype)
        assert report.fused["rms_norm_quant"] == 1, statuses(report, "rms_norm_quant")
        assert report.fused["rms_norm"] == 0, "nothing is left of it"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.parametrize("spelling", GATES)
def test_a_gated_activation(spelling, quantised, dtype):
    report = held(gate(spelling, quantised), data((5,), 64, dtype)[:1], dtype)
    assert report.fused["silu_mul_quant"] == 1, statuses(report, "silu_mul_quant")


@pytest.mark.parametrize("rule, fn", [(RULES[0], norm("vllm", "ours", True)), (RULES[1], gate("chunk", "ours"))])
def test_only_if_asked_for(rule, fn):
    args = data((5,), 64, torch.bfloat16, True)[: 3 if rule == RULES[0] else 1]
    report = held(fn, args, torch.bfloat16, enabled=[])
    assert statuses(report, rule) == [("disabled", "opt-in: name it in enable_rules")]


def floored(y):
    scale = (y.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-5)
    return (y.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


def tensor_wide(y):
    scale = y.float().abs().amax() / 127
    return (y.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


def columns(y):
    scale = y.float().abs().amax(0, keepdim=True) / 127
    return (y.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


def narrow(y):
    scale = y.abs().amax(-1, keepdim=True) / 127
    return (y / scale).round().clamp(-128, 127).to(torch.int8), scale


def grouped(y):
    return quantize(y, 16)[:2]


NEAR = {
    "a floor under the scale": (floored, "found aten.clamp_min.default"),
    "a scale for all tokens": (tensor_wide, "the scale is not one of each token"),
    "a scale of each column": (columns, "the scale is not one of each token"),
    "a scale in bfloat16": (narrow, "quantised in torch.bfloat16"),
    "groups": (grouped, "the scale is not one of each token"),
    "used elsewhere": (lambda y: (*by_division(y), y.sin()), "is used elsewhere too, by"),
    "of 255": (lambda y: (y.float() / (y.float().abs().amax(-1, keepdim=True) / 255)).round().to(torch.int8), "127"),
}


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("rule", RULES)
def test_a_near_miss_says_why(rule, name):
    quantised, reason = NEAR[name]
    x, weight = data((5,), 64, torch.bfloat16)
    fn = (lambda x: quantised(vllm(x, weight))) if rule == RULES[0] else (lambda x: quantised(GATES["chunk"](x)))
    _, report = lowered(fn, x, enable_rules=RULES)
    ((status, found),) = statuses(report, rule)
    assert status == "near_miss" and reason in found, (status, found)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: by_division(x.sin()),
        lambda x: by_division(F.gelu(x) * x.cos()),
        lambda x: by_division(F.layer_norm(x, x.shape[-1:])),
        lambda x: x.round().to(torch.int8),
        lambda x: vllm(x, x[0]).to(torch.int32).to(torch.int8),
    ],
)
def test_what_is_not_its_business(fn):
    _, report = lowered(fn, data((5,), 64, torch.bfloat16)[0], enable_rules=RULES)
    assert not any(status == "fused" for rule in RULES for status, _ in statuses(report, rule))


def test_a_sum_that_is_needed_before_the_codes_is_a_near_miss():
    def fn(x, weight, other):
        s = x + other
        y = vllm(s, weight)
        scale = y.float().abs().amax(-1, keepdim=True) / 127
        factor = s.sin()  # stands before the codes in the graph
        return ((y.float() / scale).round() * 1).to(torch.int8), factor

    _, report = lowered(fn, *data((5,), 64, torch.bfloat16, True), enable_rules=RULES)
    ((status, reason),) = statuses(report, "rms_norm_quant")
    assert status == "near_miss" and "before" in reason, (status, reason)


@st.composite
def cases(draw):
    return {
        "rows": draw(st.sampled_from([(1,), (7,), (2, 3), (0,), (33,)])),
        "size": draw(st.sampled_from([2, 16, 34, 100])),
        "dtype": draw(st.sampled_from(FLOATS)),
        "what": draw(st.sampled_from([*NORMS, *GATES])),
        "quantised": draw(st.sampled_from(list(QUANTISED))),
        "residual": draw(st.booleans()),
        "symbolic": draw(st.booleans()),
        "extreme": draw(st.sampled_from([1.0, 1.0, 1e-3, 100.0])),
    }


@pytest.mark.parametrize("examples", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_random_shapes(examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(cases())
    def run(case):
        args = data(case["rows"], case["size"], case["dtype"], case["residual"])
        args[0] = args[0] * case["extreme"]
        symbolic = case["symbolic"] and case["rows"][0] > 1
        if case["what"] in NORMS:
            fn = norm(case["what"], case["quantised"], case["residual"])
        else:
            fn, args = gate(case["what"], case["quantised"]), args[:1]
        report = held(fn, args, case["dtype"], symbolic)
        assert sum(report.fused[rule] for rule in RULES) == 1, report.matches

    run()


def test_a_layer_in_front_of_an_integer_product():
    """As users have it: symbolic tokens, Inductor's code, the codes and scales in `gcu::int8_gemm`."""
    torch.manual_seed(0)
    weight, codes, scale = torch.rand(32) + 0.5, torch.randint(-127, 128, (24, 32)).to(torch.int8), torch.rand(24) / 99

    def fn(x, other):
        s = x + other
        q, x_scale = by_division(vllm(s, weight))
        return (torch._int_mm(q, codes.t()).float() * x_scale * scale).to(x.dtype), s

    args = data((18,), 32, torch.float32, True)
    args = [args[0], args[2]]
    for one in args:
        torch._dynamo.mark_dynamic(one, 0)
    with torch.no_grad():
        report = gcu_compile.explain(fn, *args, options={"enable_rules": RULES[:1]})
    assert report.fused["rms_norm_quant"] == report.fused["int8_gemm"] == 1
    assert report.calls["rms_norm_quant: host_cpp"] == 1 and not report.fallbacks
    step = float(args[0].abs().max()) / 127 * 128 * float(scale.max())  # one code, by the largest weight
    assert report.error <= step
