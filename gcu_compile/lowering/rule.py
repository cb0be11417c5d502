"""A rewrite rule is data.

    anchor operation -> match(node): what the rewrite needs, or the reason why not
                     -> guard(match): the reason why it must not fire, or None
                     -> build(graph, match): the node that takes the anchor's place

`eager` says in plain torch what the new node means; tests hold the build against it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from gcu_compile.options import Options


@dataclass(frozen=True)
class Refusal:
    """Why a rule does not apply here. `near`: everything matched but this one thing."""

    reason: str
    near: bool = False


def _always(match: Any) -> str | None:
    return None


def _nothing(node: torch.fx.Node, match: Any) -> str:
    return ""


def _here(node: torch.fx.Node, match: Any) -> torch.fx.Node:
    return node


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: unique; what `disable_rules` and the report use.
        step: the pipeline step that it belongs to.
        anchors: operations at which it is tried; a collection that may grow.
        match: node -> any value that `build` needs, a `Refusal`, or None (not this rule's business,
            and not reported).
        build: (graph, node, match) -> the replacement; called with insertion before `place`. None: the rule
            recognises a chain that is already in the form which Inductor fuses, and leaves it as it is.
        eager: the meaning of the replacement in plain torch.
        guard: match -> reason to refuse, or None.
        note: (node, match) -> what the report shall say of a place that is fused.
        place: (node, match) -> the node before which new ones stand: `node`, or one before it whose users need them.
        opt_in: changes numerics, or does not always pay; fires only when named in `enable_rules`.
    """

    name: str
    step: str
    anchors: Collection[Any]
    match: Callable[[torch.fx.Node], Any]
    build: Callable[[torch.fx.Graph, torch.fx.Node, Any], torch.fx.Node] | None
    eager: Callable
    guard: Callable[[Any], str | None] = _always
    note: Callable[[torch.fx.Node, Any], str] = _nothing
    place: Callable[[torch.fx.Node, Any], torch.fx.Node] = _here
    opt_in: bool = False

    def is_on(self, options: Options) -> bool:
        """Whether it fires at all with these options."""
        named = self.name in options.enable_rules or not self.opt_in
        return named and self.name not in options.disable_rules and self.step not in options.disable_steps


def value_of(node: Any) -> Any:
    """The fake value of a node, or None."""
    return node.meta.get("val") if isinstance(node, torch.fx.Node) else None


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are known to be equal without adding a guard on a symbol."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return left is right or bool(statically_known_true(left == right))


def other_size(left: Any, right: Any) -> bool:
    """Whether two sizes are known to differ, without adding a guard on a symbol."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left != right))


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """`same_size` for every dimension."""
    return left.dim() == right.dim() and all(map(same_size, left.shape, right.shape))
