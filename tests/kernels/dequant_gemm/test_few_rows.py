"""A row or two of bfloat16 and codes of 4 bits: activations become digits of 8 bits, or stay what they are."""

import math

import pytest
import torch
from amx_emulation import TILED
from dequant_cases import FLOATS, assert_close, dequant_arguments, dequant_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.kernels.host import dequant_gemm as host


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 64, 70, 200]),
    st.sampled_from([(1, 1), (7, 7), (8, 1), (24, 3), (72, 3), (30, 5), (520, 5), (1200, 1), (1536, 12)]),
    st.sampled_from(FLOATS),
    *[st.booleans()] * 3,
    st.integers(0, 99),
)
def test_odd_shapes(m, n, size, scales, zeros, g_idx, bias, seed):
    a = dequant_arguments("host_int4", m, n, *size, torch.bfloat16, scales, zeros, g_idx, bias, seed)
    assert_close(host.run(**a), dequant_reference(**a), size[0])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("spread", [1, 8, 20])
def test_activations_far_apart(spread, zeros):
    """What the digits of the small ones lose is less than a float32 sum would lose of the largest."""
    a = dequant_arguments("host_int4", 2, 70, 512, 4, torch.bfloat16, zeros=zeros)
    a["x"][:, 5::64] *= 2.0**spread
    largest = a["x"].abs().max().item()
    error = (host.run(**{**a}).double() - dequant_reference(**a)).abs()
    assert (error <= dequant_reference(**a).abs() * 2**-8 + largest * 2**-20).all()


@pytest.mark.parametrize("size", [2.0**-120, 2.0**-30, 2.0**30, 2.0**100])
def test_activations_of_every_size(size):
    a = dequant_arguments("host_int4", 1, 70, 256, 2, torch.bfloat16, zeros=True)
    once = dequant_reference(**a)
    a["x"] = a["x"] * size
    assert_close((host.run(**a).double() / size).bfloat16(), once, 256)


def test_a_group_of_nothing():
    a = dequant_arguments("host_int4", 2, 70, 256, 2, torch.bfloat16, zeros=True)
    a["x"][:, :128] = 0
    assert_close(host.run(**a), dequant_reference(**a), 256)
    a["x"][:] = 0
    assert not host.run(**a).any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_activations_without_digits(value):
    a = dequant_arguments("host_int4", 2, 70, 256, 2, torch.bfloat16)
    a["x"][1, 7] = value
    y = host.run(**a)
    assert not torch.isfinite(y[1]).any()
    assert_close(y[:1], dequant_reference(**{**a, "x": a["x"][:1]}), 256)


def test_a_scale_that_is_no_number_spoils_its_own_output():
    a = dequant_arguments("host_int4", 1, 130, 256, 2, torch.bfloat16, zeros=True)
    a["scales"][1, 66] = math.nan
    y = host.run(**a)
    rest = torch.arange(130) != 66
    assert y[:, 66].isnan().all()
    assert_close(y[:, rest], dequant_reference(**a)[:, rest], 256)


@pytest.mark.parametrize("isa", TILED)
def test_avx512_alone_gives_the_same(isa, use_isa):
    use_isa(isa)
    a = dequant_arguments("host_int4", 1, 130, 512, 4, torch.bfloat16, zeros=True)
    best = host.run(**a)
    use_isa("avx512")
    assert torch.equal(host.run(**a), best)
