"""The quantised products' Triton kernels in the interpreter, against the operations' meanings."""

import pytest
import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.dequant_gemm import eager, integers, layouts
from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.kernels.triton import dequant_gemm, int8_gemm

pytest.importorskip("triton")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def weight_of(g, layout, experts, n, k):
    """Random codes of every value, stored."""
    form = layouts.get(layout)
    low, high = form.range
    codes = torch.randint(low, high + 1, (experts, n, k), generator=g)
    return torch.stack([layouts.pack(one, form) for one in codes]), low, high


def cuts(g, rows, experts):
    """Offsets with empty experts and a last row that belongs to none."""
    inner = torch.randint(0, rows, (experts - 1,), generator=g).tolist()
    return torch.tensor([0, *sorted(inner), rows - 1])


DEQUANT = {
    "one group": {"groups": 1},
    "zero points, bias": {"zeros": int, "bias": True},
    "bfloat16, groups of 32": {"dtype": BF16, "groups": 8, "zeros": int},
    "float16, float zero points, inputs beyond a tile": {"dtype": F16, "k": 120, "groups": 1, "zeros": float},
    "groups of 96": {"k": 192, "zeros": int},
    "act-order": {"act_order": True, "zeros": int},
    "act-order, bfloat16": {"act_order": True, "dtype": BF16},
    "many rows": {"rows": 100, "n": 200, "layout": "int8_columns", "dtype": BF16},
    "one output": {"rows": 1, "n": 1, "k": 16, "groups": 1},
    "bfloat16 scales": {"scales": BF16},
    **{name: {"layout": name, "zeros": int} for name in ("gptq_int8", "int8_columns", "uint8_columns")},
    **{f"{name} on cuda": {"layout": name, "zeros": int, "target": "cuda"}
       for name in ("int8_rows", "int4_rows", "int4_rows_signed", "int4_rows_i32", "int8_rows_i32", "uint8_rows")},
    "experts": {"experts": 5, "rows": 70, "bias": True, "zeros": int},
    "experts, 8 bits": {"experts": 3, "rows": 9, "layout": "int8_columns", "dtype": BF16},
}  # fmt: skip


@pytest.mark.parametrize("name", DEQUANT)
def test_dequant_gemm(name, monkeypatch):
    asked = {"dtype": F32, "rows": 5, "n": 70, "k": 256, "groups": 2, "layout": "gptq_int4", "target": "gcu300",
             "experts": 0, "scales": F32} | DEQUANT[name]  # fmt: skip
    monkeypatch.setattr(dequant_gemm, "target_of", lambda tensor: asked["target"])
    g, experts, n, k = torch.Generator().manual_seed(0), max(1, asked["experts"]), asked["n"], asked["k"]
    layout, shape = asked["layout"], (experts, asked["groups"], n)
    weight, low, high = weight_of(g, layout, experts, n, k)
    scales = ((torch.rand(shape, generator=g) + 0.2) / (high - low)).to(asked["scales"])
    zeros = None
    if "zeros" in asked:
        zeros = torch.rand(shape, generator=g) * (high - low) + low
        zeros = zeros.round().to(torch.int64) if asked["zeros"] is int else zeros
    g_idx = torch.randint(0, asked["groups"], (experts, k), generator=g) if asked.get("act_order") else None
    bias = torch.randn(experts, n, generator=g).to(asked["dtype"]) if asked.get("bias") else None
    x = torch.randn(asked["rows"], k, generator=g).to(asked["dtype"])
    rest = [weight, scales, zeros, g_idx, bias]
    if asked["experts"]:
        offsets = cuts(g, asked["rows"], experts)
        assert dequant_gemm.refuses_grouped(x, offsets, *rest, layout=layout) is None
        y = dequant_gemm.run_grouped(x, offsets, *rest, layout=layout)
        expected = eager.dequant_gemm_grouped(x.double(), offsets, *rest, layout=layout)
    else:
        rest = [None if one is None else one[0] for one in rest]
        assert dequant_gemm.refuses(x, *rest, layout=layout) is None
        y = dequant_gemm.run(x, *rest, layout=layout)
        expected = eager.dequant_gemm(x.double(), *rest, layout=layout)
    assert y.dtype == asked["dtype"]
    size = expected.abs().max().item()
    torch.testing.assert_close(y.double(), expected, **tolerance(asked["dtype"], k, size))


INT8 = {
    "codes": {},
    "zero points on both sides, bias": {"x_zeros": True, "zeros": True, "bias": True},
    "unsigned codes": {"layout": "uint8_columns"},
    "unsigned codes, zero points": {"layout": "uint8_columns", "x_zeros": True, "zeros": True},
    "dynamic": {"dtype": BF16},
    "static": {"dtype": F32, "x_zeros": True},
    "experts, codes": {"experts": 4, "rows": 70, "bias": True},
    "experts, dynamic": {"experts": 3, "rows": 9, "dtype": BF16},
    "experts, zero points on both sides": {"experts": 4, "rows": 70, "x_zeros": True, "zeros": True, "bias": True},
    "experts, unsigned codes, zero points":
        {"experts": 3, "rows": 9, "layout": "uint8_columns", "x_zeros": True, "zeros": True},
    "experts, static": {"experts": 5, "rows": 40, "dtype": BF16, "x_zeros": True},
    "experts, static, each its own": {"experts": 5, "rows": 40, "dtype": BF16, "x_zeros": True, "of_experts": True},
    "experts, codes, each its own zero": {"experts": 3, "rows": 9, "x_zeros": True, "zeros": True, "of_experts": True},
    "one output, float16": {"rows": 300, "n": 1, "k": 1000, "out_dtype": F16},
}


@pytest.mark.parametrize("name", INT8)
def test_int8_gemm_equals_its_meaning_bit_for_bit(name):
    asked = {"dtype": torch.int8, "rows": 5, "n": 70, "k": 100, "layout": "int8_columns", "experts": 0} | INT8[name]
    g, experts, n, k = torch.Generator().manual_seed(0), max(1, asked["experts"]), asked["n"], asked["k"]
    rows, layout, codes = asked["rows"], asked["layout"], asked["dtype"] == torch.int8
    weight, low, high = weight_of(g, layout, experts, n, k)
    scales = torch.rand(experts, 1, n, generator=g) * 0.01
    if codes:
        x = torch.randint(-128, 128, (rows, k), generator=g).to(torch.int8)
    else:
        x = torch.randn(rows, k, generator=g).to(asked["dtype"])
    of_x = (experts, 1, 1) if "of_experts" in asked else (rows, 1)
    x_scales = torch.rand(of_x, generator=g) * 0.1 + 0.01 if codes or "x_zeros" in asked else None
    x_zeros = torch.randint(-50, 50, of_x, generator=g) if "x_zeros" in asked else None
    zeros = torch.randint(low, high + 1, (experts, 1, n), generator=g) if "zeros" in asked else None
    bias = torch.randn(experts, n, generator=g) if "bias" in asked else None
    options = {"layout": layout, "out_dtype": asked.get("out_dtype")}
    if asked["experts"]:
        arguments = (x, cuts(g, rows, experts), weight, scales, x_scales, bias)
        options |= {"x_zeros": x_zeros, "zeros": zeros}
        assert int8_gemm.refuses_grouped(*arguments, **options) is None
        y, expected = int8_gemm.run_grouped(*arguments, **options), eager.int8_gemm_grouped(*arguments, **options)
    else:
        zeros, bias = (None if one is None else one[0] for one in (zeros, bias))
        arguments = (x, weight[0], scales[0], x_scales, x_zeros, zeros, bias)
        assert int8_gemm.refuses(*arguments, **options) is None
        y, expected = int8_gemm.run(*arguments, **options), eager.int8_gemm(*arguments, **options)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "group_size", "symmetric"),
    [
        ((5, 70), F32, 0, True),
        ((5, 70), F32, 0, False),
        ((5, 256), BF16, 32, True),
        ((2, 3, 20000), F16, 0, False),
        ((1, 1), F32, 0, True),
    ],
)
def test_quantize_per_token_equals_its_meaning_bit_for_bit(shape, dtype, group_size, symmetric):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    if shape == (5, 70):
        x[1], x[2], x[3, 0] = 0, x[2].abs(), 1e6
    for actual, expected in zip(
        int8_gemm.quantize(x, group_size, symmetric), eager.quantize(x, group_size, symmetric), strict=True
    ):
        assert torch.equal(actual, expected)


def test_refusals_name_the_remedy():
    x, scales = torch.zeros(1, 64), torch.ones(2, 64)
    assert "torch.float64" in dequant_gemm.refuses(x.double(), x, scales, layout="gptq_int4")
    assert "repack to gptq_int4" in dequant_gemm.refuses(x, x, scales, layout="awq_int4")
    assert "inputs innermost" in dequant_gemm.refuses(x, x, scales, layout="int8_rows")
    assert "share words" in dequant_gemm.refuses(x, x, torch.ones(16, 64), layout="gptq_int4")
    assert "several codes" in int8_gemm.refuses(x, x, scales, layout="gptq_int8")
    ones = torch.ones(1, 1)
    for name in ("zeros", "x_zeros"):
        reason = int8_gemm.refuses(x, x, scales, ones, **{name: ones}, layout="int8_columns")
        assert f"{name} are torch.float32: zero points that may not be whole" in reason
        given = (x, None, x, scales, ones)
        assert int8_gemm.refuses_grouped(*given, **{name: ones}, layout="int8_columns") == reason


@pytest.mark.parametrize(("k", "fits"), [(integers.MOST_INPUTS_WITH_ZEROS, True), (40000, False)])
def test_zeros_on_both_sides_sum_exactly_or_not_at_all(k, fits):
    """Products of 255 * 255, the largest: 33025 of them fit in 32 bits."""
    x, weight = torch.full((2, k), 127, dtype=torch.int8), torch.full((k, 1), 127, dtype=torch.int8)
    zero, ones = torch.full((1, 1), -128, dtype=torch.int32), torch.ones(2, 1)
    arguments, options = (x, weight, ones[:1], ones, zero.expand(2, 1), zero), {"layout": "int8_columns"}
    if fits:
        assert int8_gemm.refuses(*arguments, **options) is None
        assert torch.equal(int8_gemm.run(*arguments, **options), eager.int8_gemm(*arguments, **options))
    else:
        assert "40000 inputs may not fit in 32 bits; 33025 do" in int8_gemm.refuses(*arguments, **options)
        assert int8_gemm.refuses(*arguments[:4], None, zero, **options) is None


def test_every_layout_for_the_cards_loads_as_it_lies():
    for layout in dequant_gemm.LAYOUTS.values():
        assert dequant_gemm.refuses_layout(layout, "gcu300") is None


NAMES = ["dequant_gemm", "dequant_gemm_grouped", "int8_gemm", "int8_gemm_grouped", "quantize_per_token"]


@pytest.mark.parametrize("name", NAMES)
def test_operation_names_its_kernel(name):
    kernel = {i.name: i for i in registry.get(name).implementations}["triton"]
    assert kernel.devices == ("cuda", "gcu")


def test_the_kernel_is_called_after_the_checks():
    kernel = {i.name: i for i in registry.get("dequant_gemm").implementations}["triton"]
    with pytest.raises(InvalidInputError, match="weight is"):
        kernel.run(torch.zeros(1, 64), torch.zeros(1, 1), torch.ones(2, 64), layout="gptq_int4")
