"""A model of four layers and a rule with a slip in it: the case that docs/debugging.md tracks down.

    gcu-compile bisect examples/wrong.py:case
"""

import torch

from gcu_compile.lowering import pipeline
from gcu_compile.lowering.rule import Rule
from gcu_compile.lowering.rules import all_rules


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(0, 1) * 0.25
        return x + torch.softmax(scores, -1) @ self.value(x)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer() for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return torch.relu(x)


def swap(graph, node, match):
    """x + y becomes y + x: right, but for a slip in the third layer, which adds y twice."""
    x, y = node.args
    doubled = str(node.meta.get("nn_module_stack")).count("layers.2")
    new = graph.call_function(node.target, (y, y if doubled else x))
    new.meta.update(node.meta)
    return new


def case():
    rule = Rule("swap_residual", "canonicalise", (torch.ops.aten.add.Tensor,), lambda node: node, swap, torch.add)
    pipeline.all_rules = lambda: (*all_rules(), rule)
    torch.manual_seed(0)
    model = Model()

    def fn(x):
        with torch.no_grad():
            return model(x)

    return fn, (torch.randn(5, 16),)
