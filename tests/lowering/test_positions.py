"""What is read of a tensor of positions is what its values are."""

import pytest
import torch
from lowered import calls  # noqa: F401  (defines the operations)
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gcu_compile.lowering.positions import Affine, Condition, Positions, TwoValued
from gcu_compile.torch_private import select_decomp_table


def n(x, d=0):
    return torch.arange(x.shape[d])


def packed(x):
    """The test of transformers for packed sequences, on the default position ids."""
    ids = n(x)[None].expand(2, -1)
    jumps = torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1
    place = jumps.cumsum(-1)
    return place[:, :, None] == place[:, None, :]


KNOWN = {
    "affine": lambda x: n(x)[:, None] * 3 - n(x, 1)[None] + 2,
    "slice, select, flip of axes": lambda x: (n(x)[:, None] + 2 * n(x, 1)[None]).T[2:, 1:],
    "select": lambda x: (n(x)[:, None] + 2 * n(x, 1)[None])[:, 3],
    "cat": lambda x: torch.cat([n(x)[:1] - 1, n(x)]),
    "cumsum": lambda x: torch.ones(4, 5).cumsum(-1) - 1,
    "index": lambda x: n(x)[n(x)[:3] + 1] * 2,
    "causal": lambda x: n(x, 1)[None] <= n(x)[:, None],
    "window": lambda x: (n(x, 1)[None] <= n(x)[:, None]) & (n(x, 1)[None] > n(x)[:, None] - 3),
    "not, or": lambda x: ~(n(x, 1)[None] > n(x)[:, None]) | (n(x)[:, None] < 0),
    "tril": lambda x: torch.ones(5, 7, dtype=torch.bool).tril(1),
    "packed": packed,
    "triu of -inf": lambda x: torch.full((5, 7), -torch.inf).triu(1),
    "1 - mask": lambda x: (1.0 - (n(x, 1)[None] <= n(x)[:, None]).float()) * -1e4,
}
UNKNOWN = {
    "an input": lambda x: x > 0,
    "bfloat16 positions": lambda x: n(x).bfloat16() + 1,
    "small integers": lambda x: n(x).to(torch.int8) + 1,
    "squares": lambda x: n(x) * n(x),
    "jump": lambda x: torch.cat([n(x), n(x)]),
}


def read(fn):
    x = torch.randn(5, 7)
    with FakeTensorMode() as mode:
        gm = make_fx(fn, decomposition_table=select_decomp_table())(mode.from_tensor(x))
    node = next(node for node in reversed(gm.graph.nodes) if node.op == "output").args[0]
    return Positions().of(node), fn(x)


def values(found, shape):
    """The tensor that `found` says, at every index."""
    if isinstance(found, Affine):
        grids = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
        padded = (0,) * (len(shape) - len(found.coefficients)) + found.coefficients
        terms = (c * grid.double() for c, grid in zip(padded, grids, strict=True))
        return sum(terms, torch.full(shape, float(found.const), dtype=torch.float64))
    if isinstance(found, Condition):
        assert found.exact or found.inverse is not None
        if not found.exact:
            return ~values(found.inverse, shape)
        held = [values(part, shape) >= 0 for part in found.parts]
        return torch.stack([torch.ones(shape, dtype=torch.bool), *held]).all(0)
    assert isinstance(found, TwoValued)
    return torch.where(values(found.condition, shape), float(found.if_true), float(found.if_false))


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_read_is_what_it_is(name):
    found, expected = read(KNOWN[name])
    assert found is not None
    torch.testing.assert_close(values(found, expected.shape).double(), expected.double(), rtol=0, atol=0)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_not_guessed(name):
    found, _ = read(UNKNOWN[name])
    assert found is None or (isinstance(found, Condition) and not found.exact and not found.parts)
