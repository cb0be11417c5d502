"""Each canonical rule: fires and keeps the meaning, does not fire on another thing, says why on a near miss."""

import pytest
import torch
import torch.nn.functional as F
from lowered import calls, check, lowered, statuses

aten = torch.ops.aten
X = (2, 3, 8)
# rule -> (function that it rewrites, one that it must leave, operation that has to be gone)
CASES = {
    "square": (lambda x: x.pow(2), lambda x: x.pow(3), aten.pow.Tensor_Scalar),
    "rsqrt": (lambda x: 1 / (x * x + 1).sqrt(), lambda x: (x * x + 1).sqrt(), aten.sqrt.default),
    "mean_of_sum": (lambda x: x.sum(-1) / 8, lambda x: x.sum(-1) * 8, aten.sum.dim_IntList),
    "split_to_slice": (
        lambda x: torch.cat(x.split([3, 5], -1)[::-1], -1),
        lambda x: torch.cat(x.unbind(1), -1),
        aten.split_with_sizes.default,
    ),
    "repeated_view": (
        lambda x: x[..., :4].sin() + x[..., :4].cos(),
        lambda x: x[..., :4].sin() + x[..., 4:].cos(),
        None,
    ),
    "noop_clone": (lambda x: x.clone().sin(), lambda x: x.mT.contiguous().sin(), aten.clone.default),
    "view_of_view": (lambda x: x.view(6, 8).view(3, 16).sin(), lambda x: x.view(6, 8).sin(), None),
    "permute_of_permute": (
        lambda x: x.permute(2, 0, 1).permute(1, 2, 0).sin(),
        lambda x: x.permute(2, 0, 1).sin(),
        None,
    ),
    "noop_convert": (
        lambda x: torch.ops.prims.convert_element_type(x, x.dtype).sin(),
        lambda x: x.to(torch.float16).sin(),
        torch.ops.prims.convert_element_type.default,
    ),
    "times_one": (lambda x: (x * 1.0).sin(), lambda x: x * 2, aten.mul.Tensor),
    "bias_of_mm": (
        lambda x: (x.view(6, 8) @ x.view(6, 8).mT + x.view(-1)[:6]).view(2, 3, 6),
        lambda x: x.view(6, 8) @ x.view(6, 8).mT + x.view(6, 8)[:, :6],
        aten.mm.default,
    ),
}


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fires_and_leaves_alone(rule, dtype):
    torch.manual_seed(0)
    x = torch.randn(X, dtype=dtype)
    meant, other, gone = CASES[rule]
    narrow = dtype == torch.bfloat16 and rule in ("rsqrt", "mean_of_sum")  # they would round once less
    gm, report = check(meant, x)
    assert report.fused[rule] == (0 if narrow else 2 if rule == "split_to_slice" else 1), statuses(report, rule)
    assert narrow or gone is None or not calls(gm, gone)
    _, report = check(other, x)
    assert not report.fused[rule]


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: (x * x + 1) ** -0.5,
        lambda x: (x * x + 1).sqrt().reciprocal(),
        lambda x: 1.0 / (x * x + 1).sqrt(),
        lambda x: (x * x + 1).sqrt() ** -1,
    ],
)
def test_roots_have_one_form(spelling):
    gm, report = check(spelling, torch.randn(X))
    assert report.fused["rsqrt"] == 1 and len(calls(gm, aten.rsqrt.default)) == 1


HALVES = [lambda x: x.chunk(2, -1), lambda x: x.split(4, -1), lambda x: (x[..., :4], x[..., 4:])]


@pytest.mark.parametrize("parts", HALVES)
def test_halves_have_one_form(parts):
    gm, _ = check(lambda x: torch.cat([-parts(x)[1], parts(x)[0]], -1), torch.randn(X))
    starts = sorted(node.args[2] for node in calls(gm, aten.slice.Tensor))
    assert starts[0] == 0 and starts[-1] == 4 and not calls(gm, aten.split.Tensor)


@pytest.mark.parametrize("view", [False, True])
def test_a_linear_layer_has_one_form(view):
    x, w, b = torch.randn(2, 3, 8), torch.randn(8, 5), torch.randn(5)
    x = x if view else x[0]
    gm, report = check(lambda x, w, b: x @ w + b, x, w, b)
    other, _ = check(lambda x, w, b: F.linear(x, w.mT, b), x, w, b)
    assert report.fused["bias_of_mm"] == 1
    for one in (gm, other):
        assert len(calls(one, aten.addmm.default)) == 1 and not calls(one, aten.mm.default)


def shifted(codes, weight, by=128, dim=0, other=None, kept=False):
    """What torchao writes for a CPU that multiplies unsigned by signed bytes."""
    product = torch._int_mm((codes.to(torch.int32) + by).to(torch.uint8), weight)
    total = (weight if other is None else other).sum(dim, keepdim=True, dtype=torch.int32)
    return (product - by * total) + (product if kept else 0)


def integers(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@pytest.mark.parametrize(("rows", "k", "n"), [(17, 8, 8), (33, 24, 16), (17, 1000, 64)])
def test_products_of_shifted_codes_are_those_of_the_codes(rows, k, n):
    codes, weight = integers(rows, k), integers(k, n, seed=1)
    gm, report = lowered(shifted, codes, weight)
    assert report.fused["signed_int_mm"] == 1
    (product,) = calls(gm, aten._int_mm.default)
    assert [arg.op for arg in product.args] == ["placeholder", "placeholder"]
    assert torch.equal(gm(codes, weight), codes.int() @ weight.int())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"other": integers(24, 16, seed=2)}, "not 128 times the sum of the weight's columns"),
        ({"kept": True}, "the product of the shifted codes is used too"),
    ],
)
def test_products_of_shifted_codes_near_misses(changes, reason):
    _, report = lowered(lambda x, w: shifted(x, w, **changes), integers(17, 24), integers(24, 16, seed=1))
    assert not report.fused["signed_int_mm"]
    found = [why for status, why in statuses(report, "signed_int_mm") if status == "near_miss"]
    assert any(reason in why for why in found), found


NEAR = {
    "mean_of_sum": (lambda x: x.sum(-1) / 7, "the sum is over 8 values and divided by 7"),
    "bias_of_mm": (lambda x: x[0] @ x[0].mT + x[0, 0, :1], "the bias has 1 values for 3 columns"),
    "noop_clone": (lambda x: x.clone(), "it has to be a tensor of its own"),
    "dtype_round_trip": (lambda x: x.double().float(), "it has to be a tensor of its own"),
}


@pytest.mark.parametrize("rule", NEAR)
def test_near_miss(rule):
    fn, reason = NEAR[rule]
    _, report = lowered(fn, torch.randn(X))
    assert any(status != "fused" and reason in why for status, why in statuses(report, rule)), report.matches


def test_two_equal_views_that_are_returned_stay_two():
    def fn(x):
        y = x.sin()
        return y.view(-1), y.view(-1)

    gm, report = lowered(fn, torch.randn(X))
    assert statuses(report, "repeated_view") == [
        ("skipped", "the graph returns it, and it has to be a tensor of its own")
    ]
    assert len(calls(gm, aten.view.default)) == 2


def test_what_is_returned_may_be_written_to():
    for fn in (lambda x: x.clone(), lambda x: x.double().float(), lambda x: (x.sin().clone(), 1)[0]):
        compiled = torch.compile(fn, backend="gcu", options={"inductor": False})
        x = torch.ones(3)
        expected = fn(x)
        compiled(x).add_(5)
        assert torch.equal(x, torch.ones(3)) and torch.equal(compiled(x), expected)


@pytest.mark.parametrize("shape", [(0, 3, 8), (1, 1, 8), (5, 129, 8)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_shapes(shape, symbolic):
    if symbolic and min(shape[:2]) < 2:
        pytest.skip("0 and 1 are never symbols")
    for rule in ("square", "rsqrt", "mean_of_sum", "noop_clone"):
        _, report = check(CASES[rule][0], torch.randn(shape), symbolic=symbolic, dims=(0, 1))
        assert report.fused[rule] == 1
