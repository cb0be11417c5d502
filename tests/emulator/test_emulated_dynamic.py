"""Symbolic sizes in generated kernels: one compilation serves every batch and length, each launch checked and right."""

import pytest
import torch
from emulated import on_card

from gcu_compile.kernels.tolerance import tolerance

# (batch, tokens): the first compiles; 1 is a size of its own for Dynamo, and is left out.
SIZES = ((3, 8), (2, 33), (5, 7), (16, 65))


def rms_norm(x, w):
    return w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def silu_mul(x, w):
    gate, up = (x * w).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rotary(x, w):
    x = (x * w).unflatten(-1, (-1, 16)).transpose(1, 2)
    turned = torch.cat([-x[..., 8:], x[..., :8]], -1)
    return x * torch.cos(x) + turned * torch.sin(x)


def pairs(x, w):
    x = (x * w).unflatten(-1, (-1, 16)).transpose(1, 2)
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * 2 + turned * 3


def causal(x, w):
    scores = x @ x.transpose(1, 2) * w[0] / 8
    place = torch.arange(scores.shape[-1], device=x.device)
    return torch.softmax(scores.masked_fill(place[None] > place[:, None], float("-inf")), -1)


def sums(x, w):
    return (x * w).sum(1), x.amax(-1), x.var(-1)


def repeated(x, w):
    return (x * w)[:, :, None].expand(-1, -1, 3, -1).reshape(x.shape[0], -1, x.shape[-1])


def positions(x, w):
    return x + torch.arange(x.shape[1], device=x.device)[:, None] * w


FUNCTIONS = (rms_norm, silu_mul, rotary, pairs, causal, sums, repeated, positions)


@on_card
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_one_compilation_serves_every_size(function, dtype):
    from gcu_compile import backend
    from gcu_compile.targets.emulator import launch

    seen, original = [], launch.launch
    launch.launch = lambda kernel, grid, *args, **kwargs: (seen.append(grid), original(kernel, grid, *args, **kwargs))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="gcu", fullgraph=True, dynamic=True)
    before, w = len(backend.recordings), torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    try:
        for number, size in enumerate(SIZES):
            x = torch.randn(*size, 64, generator=torch.Generator().manual_seed(number)).to(dtype)
            with torch.no_grad():
                found = compiled(x.to("gcu"), w.to("gcu"))
            wanted = function(x.double(), w.double())
            both = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
            for got, want in both:
                bounds = tolerance(dtype, max(64, size[1]), scale=max(1.0, float(want.abs().max())))
                torch.testing.assert_close(got.cpu().double(), want, **bounds)
    finally:
        launch.launch = original
    assert len(backend.recordings) == before + 1, "a size was compiled anew"
    # Sizes are arguments of the kernels, whose grids are those of the card whatever the sizes.
    assert len(seen) >= len(SIZES) and all(0 < size <= 24 for (size, *_) in seen)
