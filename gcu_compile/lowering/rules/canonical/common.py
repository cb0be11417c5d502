"""What canonical rules share."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from gcu_compile.lowering.match import VIEWS
from gcu_compile.lowering.rule import Refusal

aten = torch.ops.aten
ALIASES = VIEWS | {aten.permute.default, aten.slice.Tensor, aten.select.int, aten.alias.default, operator.getitem}


def source(graph: Graph, node: Node, match: Any) -> Node:
    """A build: the match itself takes the anchor's place."""
    return match


def identity(x: torch.Tensor) -> torch.Tensor:
    """The meaning of a rule that removes something."""
    return x


def fresh(node: Node, replacement: Node) -> Node | Refusal:
    """`replacement`, unless the graph would then return an input, or the same tensor twice, instead of a new one.

    The caller may write to what it gets.
    """
    if not _reaches_output(node):
        return replacement
    root = replacement
    while root.op == "call_function" and root.target in ALIASES and isinstance(root.args[0], Node):
        root = root.args[0]
    if root.op == "call_function" and len(root.users) == 1:
        return replacement
    return Refusal("the graph returns it, and it has to be a tensor of its own")


def _reaches_output(node: Node) -> bool:
    return any(
        user.op == "output" or (user.op == "call_function" and user.target in ALIASES and _reaches_output(user))
        for user in node.users
    )
