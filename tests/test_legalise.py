"""The step for cards: no 64-bit tensor inside, the same values, and what cannot be narrowed is left to the vendor."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gcu_compile.kernels.attention  # noqa: F401  (defines torch.ops.gcu.attention)
from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.lowering import source_hashes
from gcu_compile.lowering.context import Context
from gcu_compile.lowering.legalise import FALLBACK, legalise
from gcu_compile.lowering.pipeline import lower
from gcu_compile.options import resolve

i64, f64 = torch.int64, torch.float64
CAST = torch.ops.prims.convert_element_type.default


def traced(function, *inputs):
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    counts = legalise(gm)
    gm.graph.lint()
    gm.recompile()
    return gm, counts


def wide_nodes(gm):
    """Nodes of 64 bits that Inductor would generate code for."""
    return [
        node.name
        for node in gm.graph.nodes
        if node.op == "call_function"
        and FALLBACK not in node.meta
        and getattr(node.target, "__name__", "") != "getitem"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and node.meta["val"].dtype in (i64, f64)
    ]


def check(function, *inputs):
    gm, counts = traced(function, *inputs)
    assert not wide_nodes(gm), gm.code
    expected, actual = function(*inputs), gm(*inputs)
    for want, got in zip(*[r if isinstance(r, (tuple, list)) else (r,) for r in (expected, actual)], strict=True):
        assert got.dtype == want.dtype
        # A float64 result was computed in float32.
        close = {"rtol": 1e-6, "atol": 1e-6} if want.dtype == f64 else {}
        torch.testing.assert_close(got, want, **close)
    return gm, counts


IDS = torch.tensor([[3, 0, 5], [1, 2, 7]])


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x: x * 2 + torch.arange(3), (IDS,)),
        (lambda x: x.sum(-1), (IDS,)),
        (lambda x: (x > 2).sum(), (IDS,)),
        (lambda x: torch.full((2,), 7) + x[:, 0], (IDS,)),
        (lambda x, w: torch.nn.functional.embedding(x, w), (IDS, torch.randn(8, 4))),
        (lambda x, w: w[x], (IDS, torch.randn(8, 4))),
        (lambda x: x.float() / 3, (IDS,)),
        (lambda x: (x * 0.5, x), (torch.randn(4, dtype=f64),)),
        (lambda x: torch.zeros(3, dtype=f64) + x, (torch.randn(3),)),
        (lambda x, i: x.index_select(0, i), (torch.randn(8, 2), torch.tensor([1, 3]))),
        (lambda x: torch.arange(4)[None] >= x[:, :1], (IDS,)),
        (lambda x: torch.cat([x, x + 1], 1).view(-1), (IDS,)),
    ],
)
def test_everything_inside_is_narrow_and_the_values_are_the_same(function, inputs):
    _, counts = check(function, *inputs)
    assert counts


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.argmax(-1),
        lambda x: torch.topk(x, 2),
        lambda x: torch.sort(x, -1),
        lambda x: x.max(-1),
        lambda x: x.cumsum(-1),
    ],
)
def test_what_the_card_is_slow_at_is_left_to_the_vendor(function):
    gm, counts = check(function, torch.randn(3, 5))
    assert counts["vendor_operations"] == 1


def test_an_operation_that_insists_on_int64_gets_it():
    """gather takes no int32 index: its index is widened again by a call, and the operation keeps its meaning."""
    check(lambda x, i: torch.gather(x, 1, i + 1), torch.randn(2, 9), IDS)


def test_a_constant_beyond_32_bits_stays_with_the_vendor():
    gm, counts = check(lambda x: (x * 2**40 + 1, (x * 2**40 > 2**41) * 2), IDS)
    assert counts["left_wide"] >= 2


def test_a_slices_end_is_no_value():
    _, counts = check(lambda x: torch.ops.aten.slice.Tensor(x, 1, 1, 2**63 - 1) + 1, IDS)
    assert "left_wide" not in counts


def test_a_graph_without_64_bits_is_left_alone():
    gm, counts = traced(lambda x: x * 2, torch.randn(3))
    assert counts == {} and not [n for n in gm.graph.nodes if n.target is CAST]


def test_a_mutated_input_keeps_its_type():
    def count(x):
        return torch.ops.aten.copy_.default(x, x + 1)

    gm, _ = traced(count, IDS.clone())
    here = IDS.clone()
    gm(here)
    assert torch.equal(here, IDS + 1)


def widened(q, k, v, out=torch.bfloat16):
    q, k, v = (x.float() for x in (q, k, v))
    result = torch.ops.gcu.attention(q, k, v, scale=0.25)
    return result.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1).to(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_that_was_widened_takes_its_own_dtype(dtype):
    inputs = [torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((4, 5), (2, 9), (2, 9))]
    gm, counts = traced(lambda q, k, v: widened(q, k, v, dtype), *inputs)
    assert counts == {"attention_kept_dtype": 1}
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert not [node for node in gm.graph.nodes if node.target in (CAST, torch.ops.aten._to_copy.default)]
    expected = widened(*(x.double() for x in inputs), torch.float64).to(dtype)
    bound = tolerance(dtype, 16)
    torch.testing.assert_close(gm(*inputs), expected, **bound)
    # Rounded once, as before.
    torch.testing.assert_close(gm(*inputs), widened(*inputs, dtype), **bound)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: widened(q, k, v, torch.float32),
        lambda q, k, v: widened(q, k, v, torch.bfloat16) + widened(q, k, v, torch.float32).sum().to(torch.bfloat16),
        lambda q, k, v: torch.ops.gcu.attention(q.float(), k.float(), v.float() * 2, scale=0.25).to(torch.bfloat16),
        lambda q, k, v: (torch.ops.gcu.attention(q.float(), k.float(), v.float(), scale=0.25) * 2).to(torch.bfloat16),
    ],
)
def test_attention_whose_float32_is_used_stays(function):
    inputs = [torch.randn(1, 2, 3, 8, dtype=torch.bfloat16) for _ in range(3)]
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    attention = [node for node in gm.graph.nodes if str(node.target) == "gcu.attention.default"]
    before = [str(node.args) for node in attention]
    counts = legalise(gm)
    kept = [str(node.args) for node in attention]
    changed = sum(a != b for a, b in zip(before, kept, strict=True))
    assert changed == counts.get("attention_kept_dtype", 0) == (len(attention) - 1)


def test_the_step_and_code_generation_are_in_the_cache_key():
    assert {"lowering/legalise.py", "codegen/kernel_private.py", "codegen/tiling.py"} <= set(source_hashes())


@pytest.mark.parametrize(("target", "runs"), [("host", False), ("cuda", False), ("gcu300", True), ("gcu400", True)])
def test_only_cards_have_the_step(target, runs):
    with FakeTensorMode():
        gm = make_fx(lambda x: x + 1)(torch.zeros(3, dtype=i64))
    context = Context(resolve({"target": target}), target)
    lower(gm, context)
    assert ("legalise" in context.report.counts) is runs
