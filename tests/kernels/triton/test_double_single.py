"""Device functions of pairs of float32, of exact sums and of Philox, in Triton's interpreter against float64."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from gcu_compile.kernels.sampling import eager  # noqa: E402
from gcu_compile.kernels.triton import double_single as ds  # noqa: E402
from gcu_compile.kernels.triton import masses, philox  # noqa: E402
from gcu_compile.targets.triton_private import Interpreted  # noqa: E402

N = 1 << 14


@triton.jit
def arithmetic(ah_ptr, al_ptr, bh_ptr, bl_ptr, out_ptr, WHAT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    ah, al = tl.load(ah_ptr + at), tl.load(al_ptr + at)
    bh, bl = tl.load(bh_ptr + at), tl.load(bl_ptr + at)
    third = ah * 0.0
    if WHAT == "add":
        hi, lo = ds.add(ah, al, bh, bl)
    elif WHAT == "multiply":
        hi, lo = ds.multiply(ah, al, bh, bl)
    elif WHAT == "inverse":
        hi, lo, third = ds.inverse(ah)
    else:
        hi, lo = ds.exp(ah, al)
    tl.store(out_ptr + at, hi)
    tl.store(out_ptr + N + at, lo)
    tl.store(out_ptr + 2 * N + at, third)


def pair(wide):
    high = wide.float()
    return high, (wide - high.double()).float()


@pytest.mark.parametrize(("what", "bits"), [("add", 46), ("multiply", 46), ("inverse", 52), ("exp", 42)])
def test_error_in_bits(what, bits):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, N, generator=generator, dtype=torch.float64)
    if what == "exp":
        a = (-a.abs() * 20).clamp(min=-60)
    (ah, al), (bh, bl) = pair(a), pair(b)
    a, b = ah.double() + al.double(), bh.double() + bl.double()
    out = torch.empty(3, N)
    Interpreted(arithmetic)[(1,)](ah, al, bh, bl, out, what, N)
    exact = {"add": a + b, "multiply": a * b, "inverse": 1 / ah.double(), "exp": a.exp()}[what]
    # A sum that cancels has the error of its summands.
    size = a.abs() + b.abs() if what == "add" else exact.abs()
    worst = ((out.double().sum(0) - exact).abs() / size).max().item()
    assert worst < 2.0**-bits, math.log2(worst)


@triton.jit
def weigh(z_ptr, out_ptr, scale_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    maximum = tl.load(scale_ptr)
    inv0, inv1, inv2 = ds.inverse(tl.load(scale_ptr + 1))
    hi, lo = masses.weight(tl.load(z_ptr + at), maximum, inv0, inv1, inv2)
    w0, w1, w2, w3 = masses.limbs(hi, lo)
    m, a0, a1, a2, a3 = masses.tile_sum(w0, w1, w2, w3, at >= 0, 0)
    hi, lo = masses.value(m, a0, a1, a2, a3)
    tl.store(out_ptr, hi)
    tl.store(out_ptr + 1, lo)


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_sum_of_weights_has_no_order(order):
    generator = torch.Generator().manual_seed(2)
    z = (torch.randn(N // 2, generator=generator) * 4).sort(descending=order == "descending").values
    if order == "random":
        z = z[torch.randperm(N // 2, generator=generator)]
    out = torch.empty(2)
    scale = torch.tensor([z.max().item(), 0.7])
    Interpreted(weigh)[(1,)](z, out, scale, N // 2)
    exact = ((z.double() - scale[0].double()) / scale[1].double()).exp().sum().item()
    assert abs(out.double().sum().item() - exact) < 2.0**-44 * exact
    # To the last bit the same in any order: the value of the ascending one.
    reference = torch.empty(2)
    Interpreted(weigh)[(1,)](z.sort().values, reference, scale, N // 2)
    assert torch.equal(out, reference)


@triton.jit
def draw(seeds_ptr, positions_ptr, out_ptr, rows, STREAM: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    mask = at < rows
    k0 = tl.load(seeds_ptr + 2 * at, mask=mask, other=0).to(tl.uint32, bitcast=True)
    k1 = tl.load(seeds_ptr + 2 * at + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
    c0 = tl.load(positions_ptr + 2 * at, mask=mask, other=0).to(tl.uint32, bitcast=True)
    c1 = tl.load(positions_ptr + 2 * at + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
    hi, lo = philox.uniform(k0, k1, c0, c1, STREAM)
    tl.store(out_ptr + 2 * at, hi, mask=mask)
    tl.store(out_ptr + 2 * at + 1, lo, mask=mask)


@pytest.mark.parametrize("stream", [0, 1])
def test_philox_is_the_meanings(stream):
    generator = torch.Generator().manual_seed(3)
    seeds = torch.randint(-(2**62), 2**62, (1000,), generator=generator)
    positions = torch.randint(0, 2**45, (1000,), generator=generator)
    seeds[0] = positions[0] = 0
    out = torch.empty(1000, 2)
    Interpreted(draw)[(1,)](seeds.view(torch.int32), positions.view(torch.int32), out, 1000, stream, 1024)
    expected = eager.uniform(seeds, positions, stream)
    assert (out.double().sum(1) - expected).abs().max() < 2.0**-48
