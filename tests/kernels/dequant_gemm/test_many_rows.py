"""Many rows of bfloat16 on AMX: weights are scaled and rounded when they are unpacked."""

import math

import pytest
import torch
from dequant_cases import FLOATS, assert_close, dequant_arguments, dequant_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.kernels.dequant_gemm import eager
from gcu_compile.kernels.host import dequant_gemm as host

pytestmark = pytest.mark.usefixtures("amx")
NATIVE = ("host_int4", "host_int8")
SCALED_FROM = {"host_int4": 129, "host_int8": 65}  # dequant_gemm.cpp


def check(arguments):
    y = host.run(**arguments)
    assert_close(y, dequant_reference(**arguments), arguments["x"].shape[-1])
    return y


def rounds_weights(y, arguments):
    """Whether `y` is nearer to the product of weights that were rounded to bfloat16."""
    inputs = {name: arguments[name] for name in ("weight", "scales", "zeros", "g_idx", "layout")}
    exact = eager.dequantise(**inputs, k=arguments["x"].shape[-1], dtype=torch.float64)
    rounded = exact.bfloat16().double()
    apart = [(y.double() - arguments["x"].double() @ w.T).square().mean() for w in (exact, rounded)]
    return apart[1] < apart[0]


@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("zeros", [False, True])
def test_scaled_weights_begin_with_many_rows(layout, zeros):
    first = SCALED_FROM[layout]
    for m in (first - 1, first):
        a = dequant_arguments(layout, m, 130, 1024, 8, torch.bfloat16, zeros=zeros)
        assert rounds_weights(check(a), a) == (m == first)


@pytest.mark.parametrize("layout", NATIVE)
def test_codes_of_one_group_are_not_rounded(layout):
    for zeros in (False, True):
        a = dequant_arguments(layout, 140, 130, 1024, 1, torch.bfloat16, zeros=zeros)
        assert not rounds_weights(check(a), a)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(NATIVE),
    st.sampled_from([65, 79, 127, 129, 150, 161, 513, 529, 1030]),
    st.sampled_from([1, 64, 70, 300]),
    st.sampled_from([(1, 1), (7, 7), (17, 1), (30, 5), (96, 3), (520, 5), (576, 9), (1200, 1), (1536, 12)]),
    st.sampled_from(FLOATS),
    *[st.booleans()] * 3,
    st.integers(0, 99),
)
def test_odd_shapes(layout, m, n, size, scales, zeros, g_idx, bias, seed):
    check(dequant_arguments(layout, m, n, *size, torch.bfloat16, scales, zeros, g_idx, bias, seed))


@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [2.0**-60, 2.0**-24, 2.0**60, 2.0**100])
def test_scales_of_every_size(layout, groups, size):
    """Results as large as their scales, within the tolerance of normal ones."""
    a = dequant_arguments(layout, 140, 70, 512, groups, torch.bfloat16, zeros=True)
    once = dequant_reference(**a)
    a["scales"] = a["scales"] * size
    assert_close((host.run(**a).double() / size).bfloat16(), once, 512)


@pytest.mark.parametrize("layout", NATIVE)
def test_scales_below_normal_numbers_are_lost_and_nothing_else(layout):
    a = dequant_arguments(layout, 140, 70, 512, 4, torch.bfloat16)
    a["scales"][0] = 1e-42
    check(a)
    a["scales"][:] = 1e-42
    assert host.run(**a).abs().max() < 1e-37


@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("groups", [1, 4])
def test_scales_that_are_no_numbers_spoil_their_own_output(layout, value, groups):
    a = dequant_arguments(layout, 140, 130, 512, groups, torch.bfloat16, zeros=True)
    a["scales"][groups - 1, 66] = value
    y = host.run(**a)
    assert not torch.isfinite(y[:, 66]).any()
    rest = torch.arange(130) != 66
    assert_close(y[:, rest], dequant_reference(**a)[:, rest], 512)


def test_zeros_that_are_not_whole():
    a = dequant_arguments("host_int4", 140, 70, 512, 4, torch.bfloat16, zeros=True)
    a["zeros"] = a["zeros"] + 0.25
    check(a)


def test_infinite_activations_stay_in_their_row():
    a = dequant_arguments("host_int4", 140, 70, 512, 4, torch.bfloat16)
    a["x"][3, 5] = math.inf
    y, clean = host.run(**a), host.run(**{**a, "x": a["x"].nan_to_num(posinf=0)})
    rest = torch.arange(140) != 3
    assert not torch.isfinite(y[3]).any() and torch.equal(y[rest], clean[rest])
