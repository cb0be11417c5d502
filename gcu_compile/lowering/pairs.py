"""Interleaved pairs as whole rows, for cards: what is turned in pairs of neighbours is read in runs, not one by one.

    stack((f(x[..., 0::2], x[..., 1::2]), g(the same)), -1).flatten(-2)        GPT-J's and GLM's rotary embedding

gives element d of the result from elements d and d + 1 (even d) or d - 1 and d (odd d). An address that goes through
d // 2 is a gather on a card, an address d + 1 is a slice. So f and g are computed on whole rows, from x and from x
moved by one element, and the result takes every other element of each:

    where(d & 1 == 0, f(x, x moved left), g(x moved right, x))

The values are the same, bit for bit. What f and g read beside x, one value for each pair (a cosine), is repeated, which
is a gather: that is done only where `SHARED` rows have it in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from gcu_compile.lowering import fakes
from gcu_compile.lowering.match import CASTS
from gcu_compile.lowering.provenance import inherit
from gcu_compile.lowering.rule import same_shape, value_of

aten, prims = torch.ops.aten, torch.ops.prims
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
ELEMENTWISE = CASTS | {aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
# Operations that both expressions together may have: they are computed twice.
LONGEST = 24
# Rows (heads) that use one row of repeated values, at least: below, the gather costs what the slices save.
SHARED = 8


def unroll_pairs(gm: torch.fx.GraphModule) -> int:
    """Rewrite `gm` in place; returns how many places were rewritten."""
    return sum(_unroll(gm.graph, node) for node in list(gm.graph.nodes) if _is_call(node, *RESHAPES))


def _is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _unroll(graph: Graph, node: Node) -> bool:
    slots = _slots(node)
    if slots is None:
        return False
    whole = _Whole(graph, node, value_of(node).shape[-1])
    operations = [whole.operations(slot) for slot in slots]
    if not all(operations) or sum(operations) > LONGEST:
        return False
    with graph.inserting_before(node):
        rows = [whole.of(expression, slot) for slot, expression in enumerate(slots)]
        place = whole.add(prims.iota.default, whole.length, start=0, step=1, dtype=torch.int32,
                          device=value_of(node).device, requires_grad=False)  # fmt: skip
        even = whole.add(aten.eq.Scalar, whole.add(aten.bitwise_and.Scalar, place, 1), 0)
        result = whole.add(aten.where.self, even, *rows)
        if not same_shape(value_of(result), value_of(node)):  # the view folds other dimensions too
            result = whole.add(aten.reshape.default, result, list(node.args[1]))
    fakes.replace(node, result)
    graph.erase_node(node)
    return True


def _slots(node: Node) -> tuple[Node, Node] | None:
    """What stands at even and at odd places of the rows of `node`, a view of a stack of two; or None."""
    stack = node.args[0]
    if not _is_call(stack, aten.cat.default) or len(stack.args[0]) != 2:
        return None
    before, after = value_of(stack), value_of(node)
    dim = stack.args[1] if len(stack.args) > 1 else 0
    rows = isinstance(before, torch.Tensor) and before.dim() > 1 and dim % before.dim() == before.dim() - 1
    if not rows or not all(isinstance(size, int) for size in (*before.shape[-2:], after.shape[-1])):
        return None
    if before.shape[-1] != 2 or after.shape[-1] != 2 * before.shape[-2]:
        return None
    parts = stack.args[0]
    if not all(_is_call(part, aten.unsqueeze.default) and part.args[1] in (-1, before.dim() - 1) for part in parts):
        return None
    return parts[0].args[0], parts[1].args[0]


def _rows(result: torch.Tensor, part: torch.Tensor) -> int:
    """How many rows of `result`, at least, have a row of `part` in common."""
    shared = 1
    sizes = [1] * (result.dim() - part.dim()) + list(part.shape)
    for size, own in zip(result.shape[:-1], sizes[:-1], strict=True):
        shared *= size if own == 1 and isinstance(size, int) else 1
    return shared


class _Whole:
    """Builds rows of `length` elements from expressions on every other one of them."""

    def __init__(self, graph: Graph, like: Node, length: int):
        self.graph, self.like, self.length = graph, like, length
        self.made: dict[tuple[Node, int], Node] = {}

    def add(self, target: Callable, *args: Any, **kwargs: Any) -> Node:
        """A new node with its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        inherit(node, self.like)
        fakes.fill([node])
        return node

    def operations(self, expression: Node) -> int:
        """Operations of an expression on pairs; 0 if it is none, or reads something that too few rows share."""
        todo, seen, found = [expression], set(), False
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if self.parity(node) is not None:
                found = True
            elif _is_call(node, *ELEMENTWISE):
                todo += [one for one in node.all_input_nodes if self.half(one)]
            elif _rows(value_of(expression), value_of(node)) < SHARED:
                return 0
        return len(seen) if found else 0

    def parity(self, node: Node) -> int | None:
        """0 or 1 where `node` is x[..., 0::2] or x[..., 1::2] of rows of the whole length."""
        if not _is_call(node, aten.slice.Tensor):
            return None
        dim, start, end, step = [*node.args[1:], *[None] * 4][:4]
        x = value_of(node.args[0])
        last = dim is not None and dim % x.dim() == x.dim() - 1
        if not last or step != 2 or start not in (None, 0, 1) or x.shape[-1] != self.length or not self.half(node):
            return None
        return start or 0

    def half(self, node: Node) -> bool:
        value = value_of(node)
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == self.length // 2

    def of(self, node: Any, slot: int) -> Any:
        """Rows whose elements at places of parity `slot` are `node`'s; the others are anything."""
        if not isinstance(node, Node) or not self.half(node):
            return node  # a number, or the same for all places of a row
        if (node, slot) not in self.made:
            self.made[node, slot] = self._of(node, slot)
        return self.made[node, slot]

    def _of(self, node: Node, slot: int) -> Node:
        parity = self.parity(node)
        if parity is not None:
            return self.moved(node.args[0], parity - slot)
        if _is_call(node, *ELEMENTWISE):
            args, kwargs = (
                torch.fx.node.map_aggregate(part, lambda one: self.of(one, slot)) for part in (node.args, node.kwargs)
            )
            return self.add(node.target, *args, **kwargs)
        return self.repeated(node)

    def moved(self, x: Node, by: int) -> Node:
        """Element d is x[d + by]; beyond the row's end it is 0."""
        if by == 0:
            return x
        last = value_of(x).dim() - 1
        begin, end, pad = (1, self.length, [0, 1]) if by > 0 else (0, self.length - 1, [1, 0])
        return self.add(aten.constant_pad_nd.default, self.add(aten.slice.Tensor, x, last, begin, end), pad, 0.0)

    def repeated(self, x: Node) -> Node:
        """Every element twice."""
        shape = list(value_of(x).shape)
        pairs = self.add(aten.expand.default, self.add(aten.unsqueeze.default, x, -1), [*[-1] * len(shape), 2])
        whole = self.add(aten.clone.default, pairs, memory_format=torch.contiguous_format)
        return self.add(aten.view.default, whole, [*self.sizes(x), self.length])

    def sizes(self, x: Node) -> list[Any]:
        """Sizes of all but the last dimension; of a symbolic one the node that computes it."""
        sizes = value_of(x).shape[:-1]
        return [n if isinstance(n, int) else self.add(aten.sym_size.int, x, dim) for dim, n in enumerate(sizes)]
