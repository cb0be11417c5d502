"""A broken step is caught right after it ran, by name of step and node."""

import operator

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

import gcu_compile.backend  # noqa: F401  (defines torch.ops.gcu.*)
from gcu_compile.errors import InvariantViolation
from gcu_compile.lowering import invariants


def graph_of_sin():
    graph, mode = Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.sin.default, (x,))
    graph.output((y,))
    with mode:
        x.meta["val"], y.meta["val"] = torch.empty(2, 3), torch.empty(2, 3)
    return GraphModule(torch.nn.Module(), graph), y


def test_a_good_graph_passes():
    gm, _ = graph_of_sin()
    invariants.check(gm, "step", invariants.signature(gm))


def test_inv_1_order():
    gm, y = graph_of_sin()
    before = invariants.signature(gm)
    x = next(iter(gm.graph.nodes))
    x.append(gm.graph.call_function(operator.neg, (y,)))
    with pytest.raises(InvariantViolation, match="after step.*INV-1"):
        invariants.check(gm, "step", before)


def test_inv_2_fake_value():
    gm, y = graph_of_sin()
    before = invariants.signature(gm)
    del y.meta["val"]
    with pytest.raises(InvariantViolation, match="INV-2: node sin"):
        invariants.check(gm, "step", before)


@pytest.mark.parametrize("wrong", [torch.empty(3, 2), torch.empty(2, 3, dtype=torch.bfloat16)])
def test_inv_4_outputs_keep_their_metadata(wrong):
    gm, y = graph_of_sin()
    before = invariants.signature(gm)
    y.meta["val"] = wrong
    with pytest.raises(InvariantViolation, match="INV-4"):
        invariants.check(gm, "step", before)


def made(graph, mode, before, target, args, value, **kept):
    """A node that rule `planted` made in the place of one that had provenance."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta["val"] = value
    replaced = graph.call_function(torch.ops.aten.sin.default, args[:1])
    replaced.meta["stack_trace"] = "model.py"
    node.meta[invariants.RULE] = invariants.MadeBy.of("planted", replaced)
    node.meta.update(kept)
    graph.erase_node(replaced)
    return node


def planted(target, *shapes_and_devices, **kept):
    """A graph with one node that a rule made of inputs on these devices."""
    graph, mode = Graph(), FakeTensorMode()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes_and_devices))]
    with mode:
        for node, (shape, device) in zip(inputs, shapes_and_devices, strict=True):
            node.meta["val"] = torch.empty(shape, device=device)
        value = torch.empty(shapes_and_devices[0][0])
    output = graph.output((inputs[0],))
    made(graph, mode, output, target, tuple(inputs), value, **kept)
    return GraphModule(torch.nn.Module(), graph)


def violation(gm, step="step"):
    with pytest.raises(InvariantViolation) as found:
        invariants.check(gm, step, invariants.signature(gm))
    return str(found.value)


def test_inv_3_fake_equals_the_meaning():
    shape = (1, 2, 3, 4)
    gm = planted(torch.ops.gcu.attention.default, (shape, "cpu"), (shape, "cpu"), (shape, "cpu"), stack_trace="m.py")
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    node.kwargs = {"scale": 1.0}
    invariants.check(gm, "step", invariants.signature(gm))
    node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    assert "INV-3: node attention_default (made by rule planted): fake" in violation(gm)


def test_inv_5_functional():
    gm = planted(torch.ops.aten.add_.Tensor, ((2, 3), "cpu"), ((2, 3), "cpu"), stack_trace="model.py")
    assert violation(gm) == "[after step] INV-5: node add__tensor (made by rule planted) writes into its arguments"


def test_inv_6_one_device():
    shape = (1, 2, 3, 4)
    gm = planted(
        torch.ops.gcu.attention.default, (shape, "cpu"), (shape, "meta"), (shape, "cpu"), stack_trace="model.py"
    )
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.kwargs = {"scale": 1.0}
    assert "INV-6: node attention_default (made by rule planted) gets tensors of ['cpu', 'meta']" in violation(gm)


def test_inv_7_no_64_bit_for_the_card():
    gm = planted(torch.ops.aten.sin.default, ((2, 3), "cpu"), stack_trace="model.py")
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["val"] = node.meta["val"].to(torch.float64)
    assert "INV-7: node sin_default (made by rule planted) is torch.float64" in violation(gm, "legalise")
    invariants.check(gm, "attention", invariants.signature(gm))


def test_inv_8_provenance():
    gm = planted(torch.ops.aten.sin.default, ((2, 3), "cpu"))
    assert "INV-8: node sin_default (made by rule planted) has lost where it comes from" in violation(gm)


def test_inv_3_is_asked_once_for_equal_arguments_and_held_against_every_node(monkeypatch):
    from dataclasses import replace

    from gcu_compile.kernels import registry

    asked = []
    op = registry.OPS["attention"]
    counted = replace(op, eager=lambda *args, **kwargs: asked.append(args) or op.eager(*args, **kwargs))
    monkeypatch.setitem(registry.OPS, "attention", counted)
    shape, meanings = (1, 2, 3, 4), {}
    gm = planted(torch.ops.gcu.attention.default, (shape, "cpu"), (shape, "cpu"), (shape, "cpu"), stack_trace="m.py")
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    node.kwargs = {"scale": 1.0}
    before = invariants.signature(gm)
    for _ in range(3):
        invariants.check(gm, "step", before, meanings)
    assert len(asked) == 1
    node.kwargs = {"scale": 2.0}
    invariants.check(gm, "step", before, meanings)
    assert len(asked) == 2
    node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    with pytest.raises(InvariantViolation, match="INV-3"):
        invariants.check(gm, "step", before, meanings)
    assert len(asked) == 2
