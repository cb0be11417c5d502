"""Where a node came from: module paths in Dynamo's spellings, and nodes that another pass made."""

import pytest
import torch

from gcu_compile.lowering.provenance import layer_of, module_path, source_line, spread


@pytest.mark.parametrize(
    ("dynamo", "path"),
    [
        ("L['self']", ""),
        ("L['self'].model.layers.3.self_attn", "model.layers.3.self_attn"),
        ("L['model'].lm_head", "lm_head"),
        ("G['net'].layers[2]", "layers.2"),
        ("L['self'].layers._modules['norm']", "layers.norm"),
        ("L['fn'].__closure__[0].cell_contents.layers.0", "layers.0"),
    ],
)
def test_module_path(dynamo, path):
    assert module_path(dynamo) == path


def test_nodes_without_provenance_take_that_of_a_neighbour():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.sin, (x,))
    second = graph.call_function(torch.cos, (first,))
    third = graph.call_function(torch.tan, (second,))
    graph.output(third)
    second.meta["nn_module_stack"] = {"1": ("L['self'].layers.4", torch.nn.Module)}
    second.meta["stack_trace"] = '  File "/somewhere/model.py", line 7, in forward\n    x = x.cos()\n'
    spread(graph)
    assert [layer_of(node) for node in (first, second, third)] == ["layers.4"] * 3
    assert source_line(first) == source_line(third) == "model.py:7"
    assert not x.meta
