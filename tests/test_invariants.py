"""A broken step is caught right after it ran, by name of step and node."""

import operator

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

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
