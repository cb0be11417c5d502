"""The matcher: what fits, what does not, and what it says of a near miss."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from gcu_compile.lowering.match import Anything, Bind, Call, Number, Through, find, number_of
from gcu_compile.lowering.rule import Refusal

aten = torch.ops.aten
SCALED = Call(aten.mul.Tensor, Call(aten.tanh.default, Call(aten.div.Tensor, Bind("x"), Number("cap"))), Number("cap"))


def last(fn, *shapes, dtype=torch.float32, tracing_mode="fake"):
    """The node that computes the result of `fn`."""
    gm = make_fx(fn, tracing_mode=tracing_mode)(*(torch.randn(s, dtype=dtype) for s in shapes))
    return next(node for node in reversed(gm.graph.nodes) if node.op == "output").args[0]


def test_binds_and_is_consistent():
    found = find(SCALED, last(lambda x: torch.tanh(x / 30.0) * 30.0, (2, 3)))
    assert found["cap"] == 30.0 and found["x"].op == "placeholder" and len(found.nodes) == 3


def test_either_order_of_a_commutative_operation():
    a, b = Call(aten.sin.default, Bind("x")), Call(aten.cos.default, Bind("x"))
    for fn in (lambda x: x.sin() * x.cos(), lambda x: x.cos() * x.sin()):
        assert find(Call(aten.mul.Tensor, a, b), last(fn, (3,)))["x"].op == "placeholder"
    assert find(Call(aten.sub.Tensor, a, b), last(lambda x: x.cos() - x.sin(), (3,))) is None


def test_near_miss_names_what_and_where():
    near = find(SCALED, last(lambda x: torch.tanh(x / 20.0) * 30.0, (2, 3)))
    assert isinstance(near, Refusal) and near.near
    assert "all but cap" in near.reason and "30.0" in near.reason
    other = find(SCALED, last(lambda x: torch.sigmoid(x / 30.0) * 30.0, (2, 3)), near=1)
    assert "aten.tanh.default (found aten.sigmoid.default) matched, at node sigmoid" in other.reason


def test_far_from_a_match_is_no_news():
    assert find(SCALED, last(lambda x: x * 30.0, (2, 3))) is None
    assert find(SCALED, last(lambda x: x + 1, (2, 3))) is None


def test_looks_through_casts_and_copies():
    pattern = Call(aten.neg.default, Through(Call(aten.exp.default, Bind("x"))))
    found = find(pattern, last(lambda x: -(x.exp().double().float().clone()), (3,)))
    assert found["x"].op == "placeholder" and len(found.nodes) == 5


@pytest.mark.parametrize("single", [True, False])
def test_single_use(single):
    pattern = Call(aten.neg.default, Call(aten.exp.default, Bind("x"), single_use=single))
    gm = make_fx(lambda x: (-(e := x.exp()), e + 1))(torch.randn(3))
    node = next(n for n in gm.graph.nodes if n.target is aten.neg.default)
    found = find(pattern, node, near=1)
    if single:
        assert "only one use of exp, which has 2" in found.reason
    else:
        assert [n.name for n in found.inner_users()] == ["exp"]


def test_alternatives():
    square = Call(aten.pow.Tensor_Scalar, Bind("x"), 2) | Call(aten.mul.Tensor, Bind("x"), Bind("x"))
    for fn in (lambda x: x.pow(2), lambda x: x * x):
        assert find(square, last(fn, (3,)))["x"].op == "placeholder"
    assert find(square, last(lambda x: x * x.sin(), (3,))) is None
    assert "the argument 2 (found 3)" in find(square, last(lambda x: x.pow(3), (3,)), near=1).reason


def test_check_gives_the_reason():
    pattern = Call(aten.neg.default, Bind("x", check=lambda n: "too long" if n.meta["val"].shape[0] > 4 else None))
    assert find(pattern, last(lambda x: -x, (3,)))
    assert "x: too long" in find(pattern, last(lambda x: -x, (5,)), near=1).reason


@pytest.mark.parametrize(
    "fn, number",
    [
        (lambda x: x.add(2.5), 2.5),
        (lambda x: x + torch.full((1, 3), 7.0), 7.0),
        (lambda x: x + torch.full((), 3.0).double().unsqueeze(0), 3.0),
        (lambda x: x + x, None),
    ],
)
def test_numbers(fn, number):
    assert number_of(last(fn, (3,)).args[1]) == number


def test_symbolic_sizes_add_no_guard():
    gm = make_fx(lambda x: torch.tanh(x / 30.0) * 30.0, tracing_mode="symbolic")(torch.randn(5, 7))
    node = next(n for n in gm.graph.nodes if n.target is aten.mul.Tensor)
    env = node.meta["val"].fake_mode.shape_env
    before = len(env.guards)
    assert find(SCALED, node) and len(env.guards) == before


def test_defaults_count_as_given():
    pattern = Call(aten.softplus.default, Bind("x"), beta=Number(value=1.0), threshold=Anything())
    assert find(pattern, last(lambda x: nn.functional.softplus(x), (3,)))
    assert "1" in find(pattern, last(lambda x: nn.functional.softplus(x, beta=2), (3,)), near=1).reason
