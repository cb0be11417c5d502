"""`gcu::linear`: packing and unpacking, and products against float64 on odd shapes and every instruction set."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensor, FakeTensorMode

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import direct, registry
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host import linear as host
from gcu_compile.kernels.linear import eager, pack, unpack
from gcu_compile.kernels.tolerance import tolerance

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HERE = [isa for isa in build.available() if isa != "amx"]  # nothing here is a product of tiles
SIZES = (1, 2, 3, 31, 32, 33, 63, 65, 100, 576)
ROWS = (1, 2, 3, 5, 11, 12, 13, 24, 25, 61)
RUNS = {"host": host.run, "direct": direct.linear, "meaning": eager.linear}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def check(run, x, weight, bias=None, within=1.0):
    found = run(x, pack(weight), len(weight), bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.dtype == x.dtype and found.shape == expected.shape
    k = x.shape[-1]
    torch.testing.assert_close(found.double(), expected, **tolerance(x.dtype, k, within * k**0.5))


@given(st.sampled_from(SIZES), st.sampled_from(SIZES), st.integers(0, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_unpacking_gives_back_every_bit(n, k, seed):
    weight = randn(n, k, seed=seed)
    packed = pack(weight)
    assert torch.equal(unpack(packed, n, k).view(torch.int16), weight.view(torch.int16))
    outside = packed.numel() - n * k
    assert (packed == 0).sum() >= outside and packed.is_contiguous()
    assert packed[0, 0, 0, 0] == weight[0, 0]
    assert n < 2 or packed[0, 0, 1, 0] == weight[1, 0]
    assert k < 2 or packed[0, 0, 0, 1] == weight[0, 1]


@pytest.mark.parametrize("name", RUNS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(ROWS),
    st.sampled_from(SIZES),
    st.sampled_from(SIZES),
    st.sampled_from([None, F32, BF16, F16]),
    st.integers(0, 99),
)
def test_products_on_odd_shapes(name, m, n, k, bias_dtype, seed):
    bias = None if bias_dtype is None else randn(n, seed=seed + 2).to(bias_dtype)
    check(RUNS[name], randn(m, k, seed=seed), randn(n, k, seed=seed + 1), bias)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("m", ROWS)
def test_every_instruction_set_and_group_of_rows(isa, m, monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    assert host.refuses(randn(m, 67), pack(randn(70, 67)), 70) is None
    check(host.run, randn(m, 67), randn(70, 67, seed=1), randn(70, seed=2))


@pytest.mark.parametrize(("m", "n"), [(3, 1111), (130, 1111), (700, 40), (61, 32)])  # many strips, many parts, one
def test_a_large_layer_in_threads(m, n):
    check(host.run, randn(m, 1536), randn(n, 1536, seed=1))


def test_threads_of_python_do_not_share_what_is_laid_out():
    layers = [(randn(m, 300, seed=m), randn(200, 300, seed=m + 1)) for m in (2, 13, 40, 90)]
    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(check, host.run, *layers[i % 4]) for i in range(60)]:
            one.result()


@pytest.mark.parametrize("isa", HERE)
def test_extreme_numbers(isa, monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    big = torch.full((2, 64), 1e18).to(BF16)
    check(host.run, big, big, within=1e36 * 8)
    x, weight = randn(3, 40), randn(50, 40, seed=1)
    x[1, 3], weight[7, 5] = torch.inf, torch.nan
    found = host.run(x, pack(weight), 50)
    expected = x.float() @ weight.float().T
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf()) and found[0, :7].isfinite().all()
    small = torch.full((1, 32), 2.0**-126).to(BF16)
    assert host.run(small, pack(torch.ones(32, 32, dtype=BF16)), 32).eq(2.0**-121).all()
    check(host.run, small / 8, torch.ones(32, 32, dtype=BF16), within=0)  # below the least normal number
    below = torch.full((3, 40), 2.37e-38).to(BF16)  # whose products are; zeros and larger rows beside them
    below[1] = 0
    check(host.run, torch.cat([below, randn(2, 40)]), randn(50, 40, seed=1))
    found = host.run(torch.cat([below, randn(2, 40)]), pack(randn(50, 40, seed=1)), 50)[:3]
    expected = below.double() @ randn(50, 40, seed=1).double().T
    torch.testing.assert_close(found.double(), expected, **tolerance(BF16, 40, expected.abs().max().item()))


def test_leading_dimensions_strides_and_no_rows():
    weight = randn(70, 48, seed=1)
    check(host.run, randn(2, 3, 48), weight)
    check(host.run, randn(48), weight)
    check(host.run, randn(48, 5).T, weight)
    check(host.run, randn(5, 96)[:, 20:68], weight)
    check(direct.linear, randn(5, 96)[:, 20:68], weight)
    check(host.run, randn(1, 48).expand(4, 48), weight)
    assert host.run(randn(0, 48), pack(weight), 70).shape == (0, 70)
    check(host.run, randn(3, 0), randn(70, 0), randn(70))
    check(host.run, randn(0), randn(70, 0), randn(70))
    check(host.run, randn(3, 48), randn(0, 48))


def test_what_the_kernel_does_not_take_is_said_and_the_meaning_runs():
    x, weight = randn(3, 40).float(), randn(50, 40).float()
    assert "float32" in host.refuses(x, pack(weight), 50)
    before = registry.calls["linear", "eager"]
    check(torch.ops.gcu.linear, x, weight)
    assert registry.calls["linear", "eager"] == before + 1


def test_the_short_way_leaves_what_it_would_have_to_look_at():
    x, weight = randn(3, 40), randn(50, 40, seed=1)
    packed = pack(weight)
    assert host.direct(x, packed, 50) is not None
    for arguments in ((x.T, packed, 50), (x[None], packed, 50), (x.float(), packed, 50), (x[:, :30], packed, 50),
                      (x, packed, 20), (x, packed, 90), (x, packed, 50, randn(49)),
                      (x, packed.transpose(0, 1), 50), (x, packed[:, :, :1, :1].contiguous(), 50), (x, packed, -1),
                      (x, packed[:0], 50), (torch._neg_view(x), packed, 50), (x, torch._neg_view(packed), 50),
                      (x, packed, 50, torch._neg_view(randn(50)))):  # fmt: skip
        assert host.direct(*arguments) is None
    check(direct.linear, torch._neg_view(x), weight)
    check(direct.linear, x, weight, torch._neg_view(randn(50, seed=2)))
    check(lambda x, packed, n, _: -direct.linear(x, torch._neg_view(packed), n), x, weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((randn(2, 40), pack(randn(50, 40)), 70), "70 outputs of 40 inputs"),
        ((randn(2, 38), pack(randn(50, 40)), 50), "expected \\[2, 19, 32, 2\\]"),
        ((randn(2, 40), randn(50, 40), 50), "as gcu_compile.kernels.linear.pack makes it"),
        ((randn(2, 40).float(), pack(randn(50, 40)), 50), "x is torch.float32, weight torch.bfloat16"),
        ((randn(2, 40).int(), pack(randn(50, 40)), 50), "the same floats"),
        ((randn(2, 40), pack(randn(50, 40)), 50, randn(51)), "bias is \\[51\\]"),
        ((randn(2, 40), pack(randn(50, 40)), -1), "-1 outputs"),
        ((randn(2, 40), torch.zeros(2, 20, 1, 1, dtype=BF16), 50), "expected \\[2, 20, 32, 2\\]"),
        ((torch.ones((), dtype=BF16), pack(randn(50, 40)), 50), "a single number"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.gcu.linear(*arguments)


def test_traced_with_fake_tensors():
    weight, bias = pack(randn(96, 64)), randn(96)
    with FakeTensorMode() as mode:
        x, weight, bias = map(mode.from_tensor, (randn(3, 64), weight, bias))
        fake = torch.ops.gcu.linear(x, weight, 96, bias)
    assert isinstance(fake, FakeTensor) and fake.shape == (3, 96) and fake.dtype == BF16


def test_generated_code_goes_the_short_way():
    weight, bias = pack(randn(96, 64)), randn(96)
    compiled = torch.compile(lambda x: torch.ops.gcu.linear(x * 2, weight, 96, bias) + 1, backend="gcu", dynamic=True)
    x = randn(5, 64)
    found, (code,) = run_and_get_code(compiled, x)
    torch.testing.assert_close(found, eager.linear(x * 2, weight, 96, bias) + 1, **tolerance(BF16, 64, 8.0))
    assert "gcu_direct.linear(" in code
