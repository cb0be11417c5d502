"""Some rows of bfloat16 and codes of 4 bits on AMX: activations are two digits of 8 bits, and more where it shows."""

import math

import pytest
import torch
from dequant_cases import FLOATS, assert_close, dequant_arguments, dequant_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.kernels.host import dequant_gemm as host

pytestmark = pytest.mark.usefixtures("amx")


def check(arguments):
    y = host.run(**arguments)
    assert_close(y, dequant_reference(**arguments), arguments["x"].shape[-1])
    return y


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.sampled_from([3, 4, 15, 16, 17, 33, 50, 64, 101, 128]),
    st.sampled_from([1, 64, 70, 200]),
    st.sampled_from([(1, 1), (7, 7), (72, 1), (128, 2), (520, 1), (520, 5), (640, 10), (1200, 1), (1536, 12)]),
    st.sampled_from(FLOATS),
    *[st.booleans()] * 3,
    st.integers(0, 99),
)
def test_odd_shapes(m, n, size, scales, zeros, g_idx, bias, seed):
    check(dequant_arguments("host_int4", m, n, *size, torch.bfloat16, scales, zeros, g_idx, bias, seed))


def with_zero_weights(arguments, inputs):
    """`arguments` with weights of zero at some inputs."""
    form, (n, k) = layouts.get("host_int4"), (arguments["scales"].shape[1], arguments["x"].shape[1])
    codes = layouts.unpack(arguments["weight"], form, n, k)
    codes[:, inputs] = 8
    if arguments["zeros"] is not None:
        arguments["zeros"][:] = 8
    return {**arguments, "weight": layouts.pack(codes, form)}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("spread", [4, 8, 12, 20, 60])
@pytest.mark.parametrize("rows", [slice(None), slice(5, 6)])
@pytest.mark.parametrize("levels", [1, 2])
def test_outputs_that_the_large_activations_do_not_reach(spread, zeros, rows, levels):
    """Large inputs in each group of some rows, whose weights are zero: the result is made of the small ones."""
    a = dequant_arguments("host_int4", 20, 70, 512, 4, torch.bfloat16, zeros=zeros)
    a = with_zero_weights(a, torch.cat([torch.arange(5 + level, 512, 128) for level in range(levels)]))
    for level in range(levels):
        a["x"][rows, 5 + level :: 128] = 2.0 ** (spread * (level + 1))
    check(a)


@pytest.mark.parametrize("zeros", [False, True])
def test_inputs_so_far_apart_that_the_squares_of_the_small_are_zero_beside_the_large(zeros):
    a = dequant_arguments("host_int4", 20, 70, 512, 4, torch.bfloat16, zeros=zeros)
    a = with_zero_weights(a, slice(5, None, 128))
    a["x"][:, 5::128] = 2.0**100
    check(a)


@pytest.mark.parametrize("few", [1, 20])
def test_what_is_lost_twice_in_some_parts_of_a_row(few):
    """Large, middle and small inputs in a part, of which the weights of the large and the middle are zero."""
    a = dequant_arguments("host_int4", 20, 70, 1024, 8, torch.bfloat16, zeros=True)
    a = with_zero_weights(a, [300, 301])
    a["x"][2:7, 256:384] = 0
    a["x"][2:7, 302 : 302 + few] = 3
    a["x"][2:7, 300], a["x"][2:7, 301] = 2.0**50, 2.0**25
    check(a)


@pytest.mark.parametrize("spread", [1, 8, 20, 60])
def test_groups_and_rows_far_apart(spread):
    a = dequant_arguments("host_int4", 20, 70, 512, 4, torch.bfloat16, zeros=True)
    a["x"][:, 128:256] *= 2.0**-spread
    a["x"][3] *= 2.0**-spread
    reference = dequant_reference(**a)
    y = check(a).double()
    assert (y[3] / reference[3].abs().max() - reference[3] / reference[3].abs().max()).abs().max() < 2**-7


@pytest.mark.parametrize("power", [1, 2, 3])
def test_activations_of_heavy_tails(power):
    """Products of normal numbers, as gated layers make them: each group has values of many sizes."""
    a = dequant_arguments("host_int4", 33, 130, 1024, 8, torch.bfloat16)
    made = torch.randn(power, *a["x"].shape, generator=torch.Generator().manual_seed(1)).prod(0)
    a["x"] = made.bfloat16()
    reference = dequant_reference(**a)
    error = (host.run(**a).double() - reference).norm() / reference.norm()
    rounding = (reference.bfloat16().double() - reference).norm() / reference.norm()
    assert error < 1.05 * rounding


@pytest.mark.parametrize("size", [2.0**-133, 2.0**-126, 2.0**-100, 2.0**-30, 2.0**30, 2.0**100, 2.0**120, 2.0**124])
@pytest.mark.parametrize("zeros", [False, True])
def test_activations_of_every_size(size, zeros):
    a = dequant_arguments("host_int4", 5, 70, 256, 2, torch.bfloat16, zeros=zeros)
    a["x"] = a["x"].sign() if size < 2.0**-126 else a["x"]
    once = dequant_reference(**a)
    a["x"] = (a["x"].double() * size).bfloat16()
    a["scales"] = a["scales"] * 2.0**20 if size < 1 else a["scales"]  # results that are numbers of bfloat16
    assert_close((host.run(**a).double() / size / (2.0**20 if size < 1 else 1)).bfloat16(), once, 256)


def test_groups_of_nothing():
    a = dequant_arguments("host_int4", 6, 70, 256, 2, torch.bfloat16, zeros=True)
    a["x"][:, :128] = 0
    check(a)
    a["x"][:] = 0
    assert not host.run(**a).any()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_activations_without_digits_do_what_they_mean(value, zeros):
    a = dequant_arguments("host_int4", 20, 70, 256, 2, torch.bfloat16, zeros=zeros)
    a["x"][3, 7], a["x"][18, 200] = value, value
    y, reference = host.run(**a), dequant_reference(**a)
    torch.testing.assert_close(y[[3, 18]].double(), reference[[3, 18]], equal_nan=True, atol=0.1, rtol=0.02)
    rest = [r for r in range(20) if r not in (3, 18)]
    assert_close(y[rest], reference[rest], 256)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scale_that_is_no_number_spoils_its_own_output(value):
    a = dequant_arguments("host_int4", 20, 130, 256, 2, torch.bfloat16, zeros=True)
    a["scales"][1, 66] = value
    y = host.run(**a)
    rest = torch.arange(130) != 66
    assert not torch.isfinite(y[:, 66]).any()
    assert_close(y[:, rest], dequant_reference(**a)[:, rest], 256)


def test_zeros_that_are_not_whole():
    a = dequant_arguments("host_int4", 9, 70, 512, 4, torch.bfloat16, zeros=True)
    a["zeros"] = a["zeros"] + 0.25
    check(a)


def test_experts_of_some_rows_are_products_of_their_own():
    cuts = (0, 3, 40, 104, 104, 121)
    experts = [dequant_arguments("host_int4", 1, 70, 256, 2, torch.bfloat16, zeros=True, seed=i) for i in range(5)]
    stacked = {name: torch.stack([one[name] for one in experts]) for name in ("weight", "scales", "zeros")}
    x = torch.randn(121, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[50, 3], x[60, 100] = 2.0**20, math.inf
    y = host.run_grouped(x, torch.tensor(cuts), **stacked, layout="host_int4")
    for first, last, one in zip(cuts, cuts[1:], experts, strict=False):
        if first < last:
            alone = host.run(x[first:last], one["weight"], one["scales"], one["zeros"], layout="host_int4")
            torch.testing.assert_close(y[first:last], alone, equal_nan=True, rtol=0, atol=0)
