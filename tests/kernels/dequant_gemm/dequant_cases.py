"""Random arguments of the quantised products, and their float64 references."""

from __future__ import annotations

import torch

from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.kernels.tolerance import tolerance

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def dequant_arguments(
    layout="gptq_int4",
    m=3,
    n=40,
    k=64,
    groups=2,
    dtype=torch.float32,
    scales=torch.float32,
    zeros=False,
    g_idx=False,
    bias=False,
    seed=0,
):
    """Arguments of `gcu::dequant_gemm`: weights of about unit output."""
    g, form = generator(seed), layouts.get(layout)
    low, high = form.range
    codes = torch.randint(low, high + 1, (n, k), generator=g)
    size = (2.0 / (high - low)) / k**0.5
    return {
        "x": torch.randn(m, k, generator=g).to(dtype),
        "weight": layouts.pack(codes, form),
        "scales": ((torch.rand(groups, n, generator=g) + 0.5) * size).to(scales),
        "zeros": torch.randint(low, high + 1, (groups, n), generator=g, dtype=torch.int16) if zeros else None,
        "g_idx": torch.randint(0, groups, (k,), generator=g, dtype=torch.int32) if g_idx else None,
        "bias": torch.randn(n, generator=g).to(dtype) if bias else None,
        "layout": layout,
    }


def dequant_reference(x, weight, scales, zeros, g_idx, bias, layout):
    """float64, element by element from the definition: sum over k of x * (code - zero) * scale."""
    form, k = layouts.get(layout), x.shape[-1]
    groups, n = scales.shape
    codes = layouts.unpack(weight, form, n, k).double()
    y = torch.zeros(*x.shape[:-1], n, dtype=torch.float64)
    for i in range(k):
        group = i // (k // groups) if g_idx is None else int(g_idx[i])
        zero = form.midpoint if zeros is None else zeros.expand(groups, n)[group].double()
        y += x[..., i : i + 1].double() * ((codes[:, i] - zero) * scales[group].double())
    return y if bias is None else y + bias.double()


def assert_close(actual, reference, length, scale=1.0):
    """`actual` against a float64 reference, at the tolerance of its dtype."""
    limits = tolerance(actual.dtype, length, scale=max(scale, reference.abs().mean().item()))
    torch.testing.assert_close(actual.double(), reference, **limits)
