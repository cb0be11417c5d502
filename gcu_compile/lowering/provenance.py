"""Where a node came from: the model's layer and the line of its source."""

from __future__ import annotations

import re

import torch

KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack")
# What Dynamo puts before the path: a local or global variable, and the cell of a closure that holds a module.
ROOT = re.compile(r"^[LG]\['[^']+'\]")
CELL = re.compile(r"\.__closure__\[\d+\]\.cell_contents")
LINE = re.compile(r'File "([^"]+)", line (\d+)')


def inherit(new: torch.fx.Node, old: torch.fx.Node) -> None:
    """Give `new` what it lacks of `old`'s provenance."""
    for key in KEPT:
        if key in old.meta and key not in new.meta:
            new.meta[key] = old.meta[key]


def spread(graph: torch.fx.Graph) -> None:
    """Give nodes that another pass made without provenance that of a user, else of an input."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for order, near in ((reversed(nodes), lambda node: node.users), (nodes, lambda node: node.all_input_nodes)):
        for node in order:
            if not node.meta.get("nn_module_stack") and not node.meta.get("stack_trace"):
                known = (other for other in near(node) if other.op == "call_function" and other.meta.get("stack_trace"))
                if (other := next(known, None)) is not None:
                    for key in KEPT:
                        if key in other.meta:
                            node.meta[key] = other.meta[key]


def layer_of(node: torch.fx.Node) -> str:
    """The innermost module's path, e.g. `model.layers.3.self_attn`; empty where none is known."""
    stack = node.meta.get("nn_module_stack") or {}
    return module_path([entry[0] for entry in stack.values()][-1]) if stack else ""


def module_path(dynamo: str) -> str:
    """Dynamo's name of a module as its path from the root.

    >>> module_path("L['self'].model.layers[3]._modules['norm']")
    'model.layers.3.norm'
    """
    path = CELL.sub("", dynamo)
    path = re.sub(r"(?:\._modules)?\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", ROOT.sub("", path))
    return path.strip(".")


def source_line(node: torch.fx.Node) -> str:
    """`file.py:line` of the model's code that the node stems from; empty where none is known."""
    places = LINE.findall(node.meta.get("stack_trace") or "")
    return f"{places[-1][0].rsplit('/', 1)[-1]}:{places[-1][1]}" if places else ""
