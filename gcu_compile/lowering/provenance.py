"""Where a node came from: the model's layer and the line of its source."""

from __future__ import annotations

import re

import torch

KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack")
LINE = re.compile(r'File "([^"]+)", line (\d+)')


def inherit(new: torch.fx.Node, old: torch.fx.Node) -> None:
    """Give `new` what it lacks of `old`'s provenance."""
    for key in KEPT:
        if key in old.meta and key not in new.meta:
            new.meta[key] = old.meta[key]


def layer_of(node: torch.fx.Node) -> str:
    """The innermost module's path, e.g. `model.layers.3.self_attn`; empty where none is known."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return re.sub(r"^L\['self'\]\.?|\['([^']+)'\]", lambda m: f".{m[1]}" if m[1] else "", paths[-1]) if paths else ""


def source_line(node: torch.fx.Node) -> str:
    """`file.py:line` of the model's code that the node stems from; empty where none is known."""
    places = LINE.findall(node.meta.get("stack_trace") or "")
    return f"{places[-1][0].rsplit('/', 1)[-1]}:{places[-1][1]}" if places else ""
