"""Cuts a logits chain out of the graph: where its logits are, and what else it reads."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from gcu_compile.lowering import probe
from gcu_compile.lowering.rule import same_shape, same_size, value_of

aten, prims = torch.ops.aten, torch.ops.prims
# What a chain is made of beside moves and arithmetic.
NAMES = (
    *("topk", "sort", "cumsum", "kthvalue", "gather", "scatter", "slice_scatter", "select_scatter", "copy"),
    *("exp", "log", "log1p", "amax", "max", "sum", "_softmax", "_log_softmax", "softmax", "log_softmax"),
    *("div", "reciprocal"),
    *("masked_fill", "logical_not", "logical_and", "logical_or", "bitwise_not", "maximum", "minimum", "clamp"),
    *("full_like", "zeros_like", "ones_like", "zeros", "empty", "logsumexp", "rsub", "lift_fresh_copy"),
    *("clamp_min", "clamp_max", "eq", "ne"),
)
LINKS = {
    getattr(getattr(aten, name), overload)
    for name in NAMES
    for overload in getattr(aten, name).overloads()
    if not overload.endswith("out") and not overload.endswith("_")
} | {operator.getitem}
TELLING = ("topk", "sort", "cumsum", "exp", "softmax", "kthvalue")  # without one of these it is no chain
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Cut:
    """What follows `logits` up to the root: `nodes`. It reads `per_row` tensors (one value a row, or one for all) and
    `numbers` (symbolic integers, sizes among them), too."""

    logits: Node
    nodes: list[Node]
    per_row: list[Node]
    numbers: list[Node]
    logs: bool = False  # the root is logits, whose softmax the probabilities are


@dataclass
class Bare:
    """Logits without what `gcu::sample` does itself: -inf where a mask says so, and the cast to a wider dtype."""

    logits: Node
    forbidden: list[Node] = field(default_factory=list)  # -inf where one of these is True
    allowed: list[Node] = field(default_factory=list)  # or where one of these is False


def is_number(node: Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt))


def links_of(root: Node, stop: Node | None = None) -> tuple[list[Node], list[Node]]:
    """The links that `root` is computed by, and the values, constants aside, that they start from."""
    links: dict[Node, None] = {}
    inputs: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in links or node in inputs or node.op == "get_attr":
            return
        if node is stop or is_number(node) or node.op != "call_function" or node.target not in probe.SAFE | LINKS:
            inputs[node] = None
            return
        for source in node.all_input_nodes:
            visit(source)
        links[node] = None

    visit(root)
    return list(links), list(inputs)


def is_chain(nodes: list[Node]) -> bool:
    return any(word in str(link.target) for link in nodes for word in TELLING)


def cuts(root: Node, nodes: list[Node], inputs: list[Node], logs: bool = False) -> Iterator[Cut]:
    """Every place where the chain may begin, the earliest first: from there on nothing is read but logits, numbers
    and one value a row. `logs`: the root is logits, and may itself be where it begins."""
    shape = value_of(root)
    for place in (*inputs, *nodes):
        value = value_of(place)
        if place is root and not logs or not isinstance(value, torch.Tensor) or value.dtype not in FLOATS:
            continue
        if not same_shape(value, shape):
            continue
        inner, sources = links_of(root, stop=place)
        others = [source for source in sources if source is not place]
        numbers = [source for source in others if is_number(source)]
        per_row = [source for source in others if not is_number(source)]
        if place in sources and (logs or is_chain(inner)) and all(is_per_row(one, shape.shape[0]) for one in per_row):
            yield Cut(place, inner, per_row, numbers, logs)


def is_per_row(node: Node, rows) -> bool:
    """[rows], [rows, 1], or one value for all rows; numbers, not truths."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool or value.is_complex() or value.dim() > 2:
        return False
    ones = [same_size(size, 1) for size in value.shape]
    return all(ones[1:]) and (not ones or ones[0] or same_size(value.shape[0], rows))


def settings_nodes(cut: Cut) -> list[Node]:
    """Values that may be a setting: the per-row inputs, and what is computed of them alone; no mere copies."""
    depends = {cut.logits}
    reads = set(cut.per_row)
    found = list(cut.per_row)
    rows = value_of(cut.logits).shape[0]
    for node in cut.nodes:
        sources = node.all_input_nodes
        if any(source in depends for source in sources):
            depends.add(node)
        elif any(source in reads for source in sources):
            reads.add(node)
            if node.target not in probe.MOVES and is_per_row(node, rows):
                found.append(node)
    return found


def bare(node: Node) -> Bare:
    """Takes masks and widening casts off the logits, as far as they are the outermost thing. -inf under a mask is what
    `forbidden` means, and a cast to a wider dtype changes no value: no probe is needed."""
    found = Bare(node)
    while True:
        node = found.logits
        if node.target is aten.where.self:
            condition, left, right = node.args
            under, over, masks = (right, left, found.forbidden) if _is_minus_inf(left) else (left, right, found.allowed)
            if not _is_minus_inf(over) or not _is_logits_like(under, node):
                return found
            if value_of(under).dtype != value_of(node).dtype:
                return found
            masks.append(condition)
            found.logits = under
        elif node.target in probe.CASTS:
            source = node.args[0]
            if value_of(node).dtype != torch.float32 or not _is_logits_like(source, node):
                return found
            found.logits = source
        else:
            return found


def _is_logits_like(node, other: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype in FLOATS and same_shape(value, value_of(other))


def _is_minus_inf(node) -> bool:
    makers = {aten.scalar_tensor.default: 0, aten.full.default: 1, aten.full_like.default: 1}
    return isinstance(node, Node) and node.target in makers and node.args[makers[node.target]] == -torch.inf
