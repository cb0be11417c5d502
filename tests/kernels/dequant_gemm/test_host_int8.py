"""The integer kernels against their meanings, on every instruction set: sums are exact, codes are equal."""

import pytest
import torch
from amx_emulation import BEST, ISAS
from dequant_cases import FLOATS, assert_close, generator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcu_compile.kernels import registry
from gcu_compile.kernels.dequant_gemm import eager, integers, layouts
from gcu_compile.kernels.host import int8_gemm as host

SHARED = [HealthCheck.function_scoped_fixture]  # all examples of a test are for one `use_isa`


def arguments(m=5, n=70, k=64, dtype=torch.int8, static=False, zeros=False, x_zeros=False, bias=False, seed=0):
    g, form = generator(seed), layouts.get("host_int8")
    x = torch.randn(m, k, generator=g) * 3
    codes = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
    static = static or dtype == torch.int8
    return {
        "x": codes if dtype == torch.int8 else x.to(dtype),
        "weight": layouts.pack(torch.randint(-128, 128, (n, k), generator=g), form),
        "scales": (torch.rand(1, n, generator=g) + 0.5) / (74 * k**0.5),
        "x_scales": (torch.rand(m, 1, generator=g) + 0.5) / 50 if static else None,
        "x_zeros": torch.randint(-128, 128, (m, 1), generator=g, dtype=torch.int32) if x_zeros and static else None,
        "zeros": torch.randint(-128, 128, (1, n), generator=g, dtype=torch.int32) if zeros else None,
        "bias": torch.randn(n, generator=g) if bias else None,
        "layout": "host_int8",
    }


def check(a):
    assert host.refuses(**a) is None
    y, meant = host.run(**a), eager.int8_gemm(**a)
    assert y.dtype == meant.dtype
    assert_close(y, meant.double(), 1)


cases = st.builds(
    arguments,
    st.sampled_from([1, 2, 5, 6, 7, 13, 16, 17, 32, 40, 50]),
    st.sampled_from([1, 16, 63, 64, 65, 130]),
    st.sampled_from([1, 3, 4, 17, 64, 130, 2100]),
    st.sampled_from([torch.int8, *FLOATS]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)


@pytest.mark.parametrize("isa", BEST)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=SHARED)
@given(cases)
def test_products_on_odd_shapes(isa, use_isa, a):
    use_isa(isa)
    check(a)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None)
@given(cases)
def test_long_sweep(a):
    check(a)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_every_instruction_set(isa, dtype, use_isa):
    use_isa(isa)
    for m, zeros in ((1, False), (4, True), (16, False), (200, True)):
        check(arguments(m, 70, 90, dtype, True, zeros, zeros, True))
    check(arguments(33, 400, 2100, dtype, True, True, True, True))  # more than one block of every size


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 70, 5), (8, 64, 64), (47, 330, 1100), (1100, 65, 60)])
def test_sums_are_exact_on_every_instruction_set(isa, m, n, k, use_isa):
    use_isa(isa)
    a = arguments(m, n, k)
    a.update(scales=torch.ones(1, n), x_scales=torch.ones(m, 1))
    codes = layouts.unpack(a["weight"], layouts.get("host_int8"), n, k)
    assert torch.equal(host.run(**a), (a["x"].double() @ codes.double().T).float())


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("m", [1, 20])
def test_extreme_codes_sum_exactly(isa, m, use_isa):
    use_isa(isa)
    k = integers.MOST_INPUTS
    ones = {"scales": torch.ones(1, 1), "x_scales": torch.ones(1, 1), "layout": "host_int8"}
    weight = layouts.pack(torch.full((1, k), -128), layouts.get("host_int8"))
    x, ones["x_scales"] = torch.full((m, k), -128, dtype=torch.int8), torch.ones(m, 1)
    assert (host.run(x, weight, **ones) == k * 128 * 128).all()
    zeros = torch.full((m, 1), 127)
    assert host.run(x, weight, **ones, x_zeros=zeros).tolist() == [[pytest.approx(k * 255 * 128, rel=1e-7)]] * m
    assert "may not fit in 32 bits" in host.refuses(torch.ones(1, k + 1).to(torch.int8), weight, **ones)


def at_the_edge(k):
    """The largest products, 255 * 255, of `k` inputs: every code far from its zero."""
    return {
        "x": torch.full((3, k), 127, dtype=torch.int8),
        "weight": layouts.pack(torch.full((1, k), 127), layouts.get("host_int8")),
        "scales": torch.ones(1, 1),
        "x_scales": torch.ones(3, 1),
        "x_zeros": torch.full((3, 1), -128, dtype=torch.int32),
        "zeros": torch.full((1, 1), -128, dtype=torch.int32),
        "layout": "host_int8",
    }


@pytest.mark.parametrize("isa", BEST)
def test_zeros_on_both_sides_sum_exactly_or_not_at_all(isa, use_isa):
    use_isa(isa)
    a = at_the_edge(integers.MOST_INPUTS_WITH_ZEROS)
    assert host.refuses(**a) is None
    assert torch.equal(host.run(**a), eager.int8_gemm(**a))
    assert (eager.int8_gemm(**a) > 2**31 - 2 * 255**2).all()
    a = at_the_edge(integers.MOST_INPUTS_WITH_ZEROS + 1)
    assert "33026 inputs may not fit in 32 bits; 33025 do" in host.refuses(**a)
    assert host.refuses(**{**a, "x_zeros": None}) is None and host.refuses(**{**a, "zeros": None}) is None


def test_a_known_layer_is_not_lent_to_zeros_that_it_may_overflow_with():
    a = at_the_edge(integers.MOST_INPUTS_WITH_ZEROS + 1)
    for one in ({**a, "x_zeros": None}, a):  # the first is within the limit, and would make the layer known
        assert torch.equal(torch.ops.gcu.int8_gemm.default(**one), eager.int8_gemm(**one))


@pytest.mark.parametrize("name", ["zeros", "x_zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_points_between_two_codes_keep_their_fraction(name, dtype):
    a = arguments(5, zeros=True, x_zeros=True)
    before = eager.int8_gemm(**a)
    a[name] = a[name].to(dtype)
    assert host.refuses(**a) is None  # floats that are whole
    assert torch.equal(host.run(**a), before)
    a[name][0] += 0.5
    assert host.refuses(**a) == f"{name} are zero points that are not whole numbers"
    y, meant = torch.ops.gcu.int8_gemm.default(**a), eager.int8_gemm(**a)
    assert torch.equal(y, meant) and not torch.equal(meant, before)
    for value in (1e10, torch.nan):
        a[name][0] = value
        assert "not whole" in host.refuses(**a)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_quantised_per_token_takes_the_short_way(symmetric):
    a = arguments(5, zeros=True)
    for _ in range(2):
        a["x"], a["x_scales"], a["x_zeros"] = torch.ops.gcu.quantize_per_token(torch.randn(5, 64), 0, symmetric)
        assert host.refuses(**a) is None
        torch.ops.gcu.int8_gemm.default(**a)
        assert host.direct(**a) is not None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(FLOATS),
    st.sampled_from([(1, 1), (5, 64), (3, 100), (2, 576)]),
    st.sampled_from([0, 1, 2, 4]),
    st.booleans(),
    st.integers(0, 99),
)
def test_activations_get_the_codes_of_the_meaning(dtype, shape, pieces, symmetric, seed):
    x = (torch.randn(shape, generator=generator(seed)) * 10 ** (seed % 7 - 3) + seed % 3).to(dtype)
    x[seed % shape[0]] *= seed % 2
    group = shape[1] // pieces if pieces and shape[1] % pieces == 0 else 0
    for found, meant in zip(host.run_quantize(x, group, symmetric), eager.quantize(x, group, symmetric), strict=True):
        torch.testing.assert_close(found, meant, rtol=0, atol=0)


def test_infinite_and_missing_activations_do_not_pass_silently():
    x = torch.ones(3, 64)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    a = arguments(3, dtype=torch.float32)
    y = host.run(**{**a, "x": x})
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all() and not torch.isfinite(y[2]).any()


@pytest.mark.parametrize("isa", BEST)
def test_grouped_runs_the_kernel(isa, use_isa):
    use_isa(isa)
    experts, offsets = [arguments(7, seed=i) for i in range(3)], torch.tensor([0, 3, 3, 7])
    stacked = {name: torch.stack([one[name] for one in experts]) for name in ("weight", "scales")}
    a = experts[0]
    before = registry.calls["int8_gemm_grouped", "host_cpp"]
    y = torch.ops.gcu.int8_gemm_grouped(a["x"], offsets, **stacked, x_scales=a["x_scales"], layout="host_int8")
    assert registry.calls["int8_gemm_grouped", "host_cpp"] == before + 1
    meant = eager.int8_gemm_grouped(a["x"], offsets, **stacked, x_scales=a["x_scales"], layout="host_int8")
    assert_close(y, meant.double(), 1)


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("codes", [False, True])
def test_experts_are_products_of_their_own(isa, codes, use_isa):
    """Of few and many rows, some without, and rows that belong to none; the very numbers of one product each."""
    use_isa(isa)
    cuts, source = (2, 3, 3, 12, 215, 240), generator(0)
    weight = torch.stack([arguments(1, seed=i)["weight"] for i in range(len(cuts) - 1)])
    scales = torch.stack([arguments(1, seed=i)["scales"] for i in range(len(cuts) - 1)])
    bias = torch.randn(len(cuts) - 1, scales.shape[-1], generator=source)
    x, x_scales = torch.randn(250, arguments(1)["x"].shape[-1] + 9, generator=source)[:, 5:-4], None
    if codes:
        x, x_scales, _ = eager.quantize(x)
    more = {"layout": "host_int8", "out_dtype": torch.bfloat16}
    y = host.run_grouped(x, torch.tensor(cuts), weight, scales, x_scales, bias, **more)
    for e, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        if first < last:
            mine = None if x_scales is None else x_scales[first:last]
            assert torch.equal(
                y[first:last], host.run(x[first:last], weight[e], scales[e], mine, bias=bias[e], **more)
            )
    assert not y[: cuts[0]].any() and not y[cuts[-1] :].any()


def experts_of(cuts, n=70, k=64, dtype=torch.int8, of_x="rows", zeros=True, x_zeros=True, per_tensor=False, seed=0):
    """(x, offsets) and the rest of `int8_gemm_grouped`, of products of their own."""
    m, count, g = cuts[-1] + 2, len(cuts) - 1, generator(seed)
    each = [arguments(1, n, k, zeros=zeros, bias=True, seed=seed + i) for i in range(count)]
    stacked = {name: torch.stack([one[name] for one in each]) for name in ("weight", "scales", "bias")}
    if per_tensor:
        stacked["scales"] = stacked["scales"][:, :, :1].expand(count, 1, n)
    rows = arguments(m, n, k, dtype, of_x != "dynamic", False, x_zeros, seed=seed)
    if of_x == "experts":
        stacked["x_scales"] = torch.rand(count, 1, 1, generator=g) / 20 + 0.01
        values = torch.randint(-128, 128, (count, 1, 1), generator=g, dtype=torch.int32)
        stacked["x_zeros"] = values if x_zeros else None
    elif of_x == "all":
        stacked["x_scales"], stacked["x_zeros"] = torch.full((1,), 0.03), torch.full((1,), -7) if x_zeros else None
    else:
        stacked["x_scales"], stacked["x_zeros"] = rows["x_scales"], rows["x_zeros"]
    stacked["zeros"] = torch.stack([one["zeros"] for one in each]) if zeros else None
    return (rows["x"], torch.tensor(cuts)), stacked | {"layout": "host_int8"}


def check_experts(given, a):
    assert host.refuses_grouped(*given, **a) is None
    y, meant = host.run_grouped(*given, **a), eager.int8_gemm_grouped(*given, **a)
    assert y.dtype == meant.dtype
    assert_close(y, meant.double(), 1)
    first, last = given[1][0], given[1][-1]
    assert not y[:first].any() and not y[last:].any()


mixtures = st.builds(
    experts_of,
    st.lists(st.integers(0, 40), min_size=2, max_size=6).map(sorted),
    st.sampled_from([1, 63, 64, 130]),
    st.sampled_from([1, 3, 64, 130, 2100]),
    st.sampled_from([torch.int8, *FLOATS]),
    st.sampled_from(["rows", "experts", "all", "dynamic"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)


@pytest.mark.parametrize("isa", BEST)
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=SHARED)
@given(mixtures)
def test_experts_on_odd_shapes(isa, use_isa, mixture):
    use_isa(isa)
    check_experts(*mixture)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(mixtures)
def test_long_sweep_of_experts(mixture):
    check_experts(*mixture)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("of_x", ["rows", "experts", "all", "dynamic"])
def test_experts_on_every_instruction_set(isa, of_x, use_isa):
    """Few and many rows, an expert without, rows without an expert; zeros on both sides."""
    use_isa(isa)
    for dtype in (torch.int8, torch.bfloat16):
        check_experts(*experts_of((1, 3, 3, 8, 214), 130, 90, dtype, of_x))
    check_experts(*experts_of((0, 2, 35), 400, 2100, torch.bfloat16, of_x))


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("of_x", ["rows", "experts"])
def test_experts_with_zeros_are_products_of_their_own(isa, of_x, use_isa):
    use_isa(isa)
    cuts = (2, 3, 3, 12, 215, 240)
    (x, offsets), a = experts_of(cuts, dtype=torch.bfloat16, of_x=of_x)
    y, names = host.run_grouped(x, offsets, **a), ("weight", "scales", "zeros", "bias")
    for e, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        own = {name: a[name][e] for name in names}
        of_rows = slice(first, last) if of_x == "rows" else e
        own |= {name: a[name][of_rows] for name in ("x_scales", "x_zeros")}
        assert torch.equal(y[first:last], host.run(x[first:last], **own, layout="host_int8"))


def test_experts_beyond_32_bits_or_between_codes_go_to_the_meaning():
    (x, offsets), a = experts_of((0, 2, 5))
    for name in ("zeros", "x_zeros"):
        assert "not whole" in host.refuses_grouped(x, offsets, **{**a, name: a[name] + 0.5})
    k = integers.MOST_INPUTS_WITH_ZEROS + 1
    (x, offsets), a = experts_of((0, 1), 1, k)
    assert "33025 do" in host.refuses_grouped(x, offsets, **a)
    host.run_grouped(x, offsets, **{**a, "x_zeros": None})
    assert host.experts.find(a["weight"], a["scales"], a["zeros"], a["bias"]) is None
