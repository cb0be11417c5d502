"""Pairs of neighbours computed on whole rows, for cards: equal bit for bit, and left alone where it does not pay."""

import pytest
import torch
from lowered import faked
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gcu_compile.lowering.pairs import SHARED, unroll_pairs
from gcu_compile.torch_private import select_decomp_table, symbolic_dispatch

SLICE = torch.ops.aten.slice.Tensor


def glm(x, cos, sin):
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + turned * sin


def gptj(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def folded(x):
    return torch.stack((-x[..., 1::2].float(), x[..., 0::2].float()), -1).reshape(x.shape[0], -1)


def unrolled(fn, *args, dims=()):
    """(graph module, places rewritten) of `fn`."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [faked(mode, arg, dims) for arg in args]
    with torch.no_grad(), mode, symbolic_dispatch():
        gm = make_fx(fn, decomposition_table=select_decomp_table())(*fakes)
    env = next(node.meta["val"] for node in gm.graph.nodes).fake_mode.shape_env
    guards = len(env.guards)
    count = unroll_pairs(gm)
    assert len(env.guards) == guards
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm, count


def steps(gm):
    """The steps of the slices that are left."""
    return {(node.args[4] if len(node.args) > 4 else 1) for node in gm.graph.nodes if node.target is SLICE}


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, SHARED, 5, 64), (1, SHARED, 1, 2), (2, 11, 3, 34)])
@pytest.mark.parametrize("fn", [glm, gptj])
@pytest.mark.parametrize("symbolic", [False, True])
def test_whole_rows_give_the_same_bits(fn, shape, dtype, symbolic):
    x = rows(*shape, dtype=dtype)
    x[0, 0, 0, 0] = float("inf")
    size = shape[-1] if fn is glm else shape[-1] // 2
    cos, sin = (rows(shape[0], 1, shape[2], size, dtype=dtype, seed=seed) for seed in (1, 2))
    gm, count = unrolled(fn, x, cos, sin, dims=(0, 2) if symbolic and shape[0] > 1 else ())
    assert count == 1 and 2 not in steps(gm)
    torch.testing.assert_close(gm(x, cos, sin), fn(x, cos, sin), rtol=0, atol=0, equal_nan=True)


def test_a_view_that_folds_more_than_the_pairs_keeps_its_shape():
    gm, count = unrolled(folded, rows(3, 4, 6, dtype=torch.bfloat16))
    assert count == 0  # the last two dimensions fold into rows of another length: not this form
    x = rows(3, 4, 6)
    torch.testing.assert_close(gm(x), folded(x), rtol=0, atol=0)


def test_an_inner_view_of_the_same_rows_is_followed():
    def fn(x):
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).reshape(-1, 6)

    x = rows(3, 4, 6)
    gm, count = unrolled(fn, x)
    assert count == 1
    assert torch.equal(gm(x), fn(x))


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda x: torch.stack((-x[..., 4:], x[..., :4]), -1).flatten(-2), id="halves"),
        pytest.param(lambda x: torch.stack((x[..., 1::2].exp(), x[..., 0::2].exp()), -1).flatten(-2), id="exp"),
        pytest.param(lambda x: torch.stack((x[..., 1::2], x[..., 0::2]), -2).flatten(-2), id="not interleaved"),
        pytest.param(lambda x: torch.stack((x[..., 1:5], x[..., 0:4]), -1).flatten(-2), id="step 1"),
        pytest.param(lambda x: torch.stack((x[..., :4], x[..., :4], x[..., 4:]), -1).flatten(-2), id="three"),
    ],
)
def test_other_stacks_are_left_alone(fn):
    assert unrolled(fn, rows(2, SHARED, 8))[1] == 0


def test_a_cosine_that_few_rows_share_is_not_repeated():
    x = rows(5, SHARED, 3, 8)
    for heads, expected in ((1, 1), (SHARED, 0)):
        cos, sin = rows(5, heads, 3, 4, seed=1), rows(5, heads, 3, 4, seed=2)
        assert unrolled(gptj, x, cos, sin)[1] == expected


def test_long_expressions_are_not_computed_twice():
    def fn(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        for _ in range(12):
            even, odd = even * 2 + odd, odd * 2
        return torch.stack((even, odd), -1).flatten(-2)

    assert unrolled(fn, rows(SHARED, 8))[1] == 0
