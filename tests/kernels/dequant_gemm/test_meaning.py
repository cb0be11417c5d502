"""The meanings against float64, and what the operations refuse."""

import pytest
import torch
from dequant_cases import FLOATS, assert_close, dequant_arguments, dequant_reference, generator
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels.dequant_gemm import eager, layouts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(layouts.LAYOUTS)),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from([(64, 1), (64, 2), (96, 3), (30, 5), (17, 1)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_dequant_gemm_means_what_it_says(layout, dtype, scales, kg, zeros, g_idx, bias, seed):
    k, groups = kg
    arguments = dequant_arguments(layout, 3, 21, k, groups, dtype, scales, zeros, g_idx, bias, seed)
    assert_close(eager.dequant_gemm(**arguments), dequant_reference(**arguments), k)


def int8_arguments(m=5, n=12, k=33, seed=0):
    g = generator(seed)
    return {
        "x": torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8),
        "weight": torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8),
        "scales": torch.rand(1, n, generator=g) / k,
        "x_scales": torch.rand(m, 1, generator=g) / 100,
    }


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_int8_gemm_is_exact_in_integers(out):
    a = int8_arguments()
    zeros, x_zeros = torch.full((1, 12), 3), torch.arange(5).unsqueeze(1) - 2
    more = {"x_zeros": x_zeros, "zeros": zeros, "bias": torch.ones(12)}
    y = torch.ops.gcu.int8_gemm(**a, **more, layout="int8_rows", out_dtype=out)
    sums = (a["x"].long() - x_zeros) @ (a["weight"].long() - 3).T
    assert_close(y, sums.double() * a["x_scales"].double() * a["scales"].double() + 1, 1)
    assert y.dtype == out


@pytest.mark.parametrize("dtype", FLOATS)
def test_dynamic_activations_are_quantised_per_token(dtype):
    a, x = int8_arguments(), torch.randn(5, 33, generator=generator(1)).to(dtype)
    y = torch.ops.gcu.int8_gemm(x, a["weight"], a["scales"], layout="int8_rows")
    codes, scales, _ = torch.ops.gcu.quantize_per_token(x)
    again = torch.ops.gcu.int8_gemm(codes, a["weight"], a["scales"], scales, layout="int8_rows", out_dtype=dtype)
    assert y.dtype == dtype and torch.equal(y, again)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantised_activations_are_within_half_a_step(dtype, group, symmetric):
    x = (torch.randn(7, 32, generator=generator(2)) + 0.3).to(dtype)
    x[3] = 0
    codes, scales, zeros = torch.ops.gcu.quantize_per_token(x, group, symmetric)
    size = group or 32
    back = (codes.unflatten(-1, (-1, size)) - zeros.unsqueeze(-1)).double() * scales.unsqueeze(-1).double()
    # Half a step; the zero's own rounding can clip the largest value by another half.
    step = scales.double().unsqueeze(-1) * (0.5 if symmetric else 1.0)
    assert bool(((back - x.double().unflatten(-1, (-1, size))).abs() <= step * (1 + 1e-5)).all())
    assert scales.shape == (7, 32 // size) and bool((codes[3] == 0).all()) and bool((scales[3] == 0).all())


def test_a_token_of_nan_gives_nan():
    x = torch.ones(2, 8)
    x[1, 3] = torch.nan
    y = torch.ops.gcu.int8_gemm(x, torch.ones(4, 8, dtype=torch.int8), torch.ones(1, 4), layout="int8_rows")
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()


@pytest.mark.parametrize("offsets", [[0, 2, 2, 5], [0, 0, 0, 0], [1, 2, 3, 4]])
def test_grouped_is_one_product_per_expert(offsets):
    experts = [dequant_arguments(m=5, zeros=True, bias=True, seed=i) for i in range(3)]
    names = ("weight", "scales", "zeros", "bias")
    stacked = {name: torch.stack([one[name] for one in experts]) for name in names}
    x = experts[0]["x"]
    y = torch.ops.gcu.dequant_gemm_grouped(x, torch.tensor(offsets), **stacked, layout="gptq_int4")
    expected = torch.zeros(5, 40)
    for e, one in enumerate(experts):
        rows = slice(offsets[e], offsets[e + 1])
        expected[rows] = torch.ops.gcu.dequant_gemm(**{**one, "x": x[rows]})
    assert_close(y, expected.double(), 64)


def test_grouped_int8():
    experts, offsets = [int8_arguments(seed=i) for i in range(2)], [0, 3, 5]
    stacked = {name: torch.stack([one[name] for one in experts]) for name in ("weight", "scales")}
    a = experts[0]
    y = torch.ops.gcu.int8_gemm_grouped(
        a["x"], torch.tensor(offsets), **stacked, x_scales=a["x_scales"], layout="int8_rows"
    )
    for e in range(2):
        rows = slice(offsets[e], offsets[e + 1])
        one = {"weight": stacked["weight"][e], "scales": stacked["scales"][e], "layout": "int8_rows"}
        assert torch.equal(y[rows], torch.ops.gcu.int8_gemm(a["x"][rows], x_scales=a["x_scales"][rows], **one))


def experts_of(rows, experts=4, n=12, k=33, of_experts=False, zeros=True, x_zeros=True, bias=True, seed=0):
    """Arguments of `gcu::int8_gemm_grouped` but x and offsets; scales and zeros of x are the experts' or the rows'."""
    g, of_x = generator(seed), (experts, 1, 1) if of_experts else (rows, 1)
    whole = {"dtype": torch.int32, "generator": g}
    return {
        "weight": torch.randint(-128, 128, (experts, n, k), generator=g, dtype=torch.int8),
        "scales": torch.rand(experts, 1, n, generator=g) / k,
        "zeros": torch.randint(-128, 128, (experts, 1, n), **whole) if zeros else None,
        "bias": torch.randn(experts, n, generator=g) if bias else None,
        "x_scales": torch.rand(of_x, generator=g) / 20 + 0.01,
        "x_zeros": torch.randint(-128, 128, of_x, **whole) if x_zeros else None,
        "layout": "int8_rows",
    }


def in_integers(x, offsets, weight, scales, zeros, bias, x_scales, x_zeros, layout):
    """float64, row by row: the sum of whole numbers, then scales and bias."""
    y = torch.zeros(len(x), scales.shape[-1], dtype=torch.float64)
    for expert, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False)):
        for row in range(first, last):
            own = expert if x_scales.dim() == 3 else row
            x_zero = 0 if x_zeros is None else int(x_zeros[own])
            codes = x[row].long() - x_zero
            if x.is_floating_point():
                codes = torch.round(x[row].float() / x_scales[own].flatten()).long()
                codes = (codes + x_zero).clamp(-128, 127) - x_zero
            right = weight[expert].long() - (0 if zeros is None else zeros[expert].long().T)
            y[row] = (right @ codes).double() * x_scales[own].double() * scales[expert, 0].double()
            y[row] += 0 if bias is None else bias[expert].double()
    return y


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=6).map(sorted),
    st.sampled_from([torch.int8, *FLOATS]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_grouped_int8_is_exact_in_integers(offsets, dtype, of_experts, zeros, x_zeros, bias, seed):
    """With zero points of either side, scales of rows or of experts, experts without rows and rows without experts."""
    a = experts_of(9, len(offsets) - 1, of_experts=of_experts, zeros=zeros, x_zeros=x_zeros, bias=bias, seed=seed)
    g = generator(seed)
    x = torch.randn(9, 33, generator=g).to(dtype)
    if dtype == torch.int8:
        x = torch.randint(-128, 128, (9, 33), generator=g, dtype=dtype)
    y = torch.ops.gcu.int8_gemm_grouped(x, torch.tensor(offsets), **a, out_dtype=torch.float32)
    assert_close(y, in_integers(x, offsets, **a), 1)
    assert not y[: offsets[0]].any() and not y[offsets[-1] :].any()


def test_bad_grouped_int8_arguments_are_named():
    a, x, offsets = experts_of(5), torch.zeros(5, 33, dtype=torch.int8), torch.tensor([0, 1, 2, 3, 5])
    for name, value, message in (
        ("x_zeros", torch.zeros(4, 1), r"x_zeros is \[4, 1\], expected \[5, 1\]"),
        ("x_scales", torch.ones(5, 1, 1), r"x_scales is \[5, 1, 1\], expected \[4, 1, 1\]"),
        ("zeros", torch.zeros(1, 11), r"zeros is \[1, 11\], expected \[4, 1, 12\]"),
    ):
        with pytest.raises(InvalidInputError, match=f"gcu::int8_gemm_grouped: {message}"):
            torch.ops.gcu.int8_gemm_grouped(x, offsets, **{**a, name: value})
    with pytest.raises(InvalidInputError, match="x_zeros need x_scales"):
        torch.ops.gcu.int8_gemm_grouped(x.float(), offsets, **{**a, "x_scales": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 64, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.zeros(3, 63)}, "2 groups do not divide 63 inputs"),
        ({"weight": torch.zeros(7, 40, dtype=torch.int32)}, r"weight is \[7, 40\].*; layout gptq_int4 stores"),
        ({"scales": torch.ones(40)}, r"scales are \[40\]"),
        ({"zeros": torch.zeros(2, 39)}, r"zeros is \[2, 39\], expected \[2, 40\]"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx is \[63\], expected \[64\]"),
        ({"bias": torch.zeros(41)}, r"bias is \[41\], expected \[40\]"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.gcu.dequant_gemm(**{**dequant_arguments(), **changes})


def test_bad_int8_arguments_are_named():
    a = int8_arguments()
    with pytest.raises(InvalidInputError, match="int8 codes need x_scales"):
        torch.ops.gcu.int8_gemm(a["x"], a["weight"], a["scales"], layout="int8_rows")
    with pytest.raises(InvalidInputError, match="layout int4_rows has 4 bits, expected 8"):
        torch.ops.gcu.int8_gemm(**a, layout="int4_rows")
    with pytest.raises(InvalidInputError, match=r"x_scales is \[4, 1\], expected \[5, 1\]"):
        torch.ops.gcu.int8_gemm(**{**a, "x_scales": torch.ones(4, 1)}, layout="int8_rows")


def test_bad_offsets_are_named():
    one = dequant_arguments()
    stacked = {name: one[name].unsqueeze(0) for name in ("weight", "scales")}
    with pytest.raises(InvalidInputError, match=r"offsets \[0, 9\] do not cut 3 rows"):
        torch.ops.gcu.dequant_gemm_grouped(one["x"], torch.tensor([0, 9]), **stacked, layout="gptq_int4")


def test_groups_that_do_not_divide_activations():
    with pytest.raises(InvalidInputError, match="groups of 7 do not divide 32 inputs"):
        torch.ops.gcu.quantize_per_token(torch.ones(2, 32), 7)


def test_a_compiled_grouped_product_is_the_operation():
    """Tensors as keywords go through tracing and generated code."""
    arguments, offsets = experts_of(5, of_experts=True), torch.tensor([0, 1, 1, 2, 4])

    def fn(x, given):
        return torch.ops.gcu.int8_gemm_grouped(x + 1, offsets, **given, layout="int8_rows") * 2

    given = {name: value for name, value in arguments.items() if name != "layout"}
    compiled, x = torch.compile(fn, backend="gcu", fullgraph=True), torch.randn(5, 33).bfloat16()
    assert torch.equal(compiled(x, given), fn(x, given))


def test_operations_are_traced_with_symbolic_rows():
    arguments = {k: v for k, v in dequant_arguments(dtype=torch.bfloat16).items() if k != "x"}

    def fn(x):
        codes, scales, _ = torch.ops.gcu.quantize_per_token(x)
        return torch.ops.gcu.dequant_gemm(x, **arguments), codes, scales

    compiled = torch.compile(fn, backend="gcu", dynamic=True, fullgraph=True, options={"inductor": False})
    for rows in (2, 5):
        x = torch.randn(rows, 64).bfloat16()
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), fn(x), strict=True))
