"""What a rule found of an attention, and the nodes that `gcu::attention` is called with.

Every tensor of an attention, however it is folded, is described by `Axes`: which of its dimensions is the batch,
the head, the query and the key (or the head's size).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from gcu_compile.lowering.layout import arranged, size_of, sources
from gcu_compile.lowering.rule import same_size, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Axes:
    """Dimensions of `node`. None: absent, and so of size 1.

    Attributes:
        lead: (batch, head), or the one dimension that is both folded into one, or the only one above 1, or
            (batch, group, head of the group), with more than one group and head.
        rows: queries (of q, scores, masks) or keys (of k, v).
        columns: keys (of scores, masks) or the head's size (of q, k, v).
        repeat: how often each head occurs in a row (grouped-query attention).
    """

    node: Node
    lead: tuple[int | None, ...]
    rows: int | None
    columns: int | None
    repeat: Any = 1

    def size(self, dim: int | None) -> Any:
        return 1 if dim is None else value_of(self.node).shape[dim]

    def batch_and_heads(self) -> tuple[Any, Any]:
        """Their sizes, where they are apart."""
        batch, *heads = map(self.size, self.lead)
        return batch, math.prod(heads)


def whole(node: Node, rank: int = 0) -> Axes:
    """The axes of a tensor [..., rows, columns] that broadcasts to one of `rank` dimensions (0: its own)."""
    shape = value_of(node).shape
    missing = (rank or len(shape)) - len(shape)
    dims: list[int | None] = [None] * missing
    dims += [None if same_size(size, 1) else d for d, size in enumerate(shape)]
    return Axes(node, tuple(dims[:-2]) or (None,), dims[-2], dims[-1])


def stops(axes: Axes) -> Iterator[Axes]:
    """The same tensor at every earlier point, back through views and copies, where its axes can be told apart.

    Batch and heads are followed one by one, and from where they are folded into one dimension, together.
    """
    last = axes
    for last in _stops(axes, [(d,) if d is not None else () for d in axes.lead]):
        yield last
    if len(last.lead) >= 2 and None not in last.lead:
        _, *later = _stops(last, [last.lead])
        yield from later


def _stops(axes: Axes, lead: list[tuple[int, ...]]) -> Iterator[Axes]:
    pair = [(d,) if d is not None else () for d in (axes.rows, axes.columns)]
    for stop in sources(axes.node, (*lead, *pair)):
        *found, rows, columns = stop.groups
        repeats = dict(stop.repeats)
        repeat = axes.repeat * repeats.pop(len(lead) - 1, 1)
        most = 3 if len(lead) == 1 else 1
        if repeats or len(rows) > 1 or len(columns) > 1 or any(len(group) > most for group in found):
            continue
        where = found[0] or (None,) if len(lead) == 1 else tuple(group[0] if group else None for group in found)
        if len(where) == 3 and None in where[1:]:
            where = (where[0], where[2] if where[1] is None else where[1])
        yield Axes(stop.node, where, *(one[0] if one else None for one in (rows, columns)), repeat)


def unfolded(axes: Axes) -> Axes:
    """The earliest of the stops: the tensor before it was repeated, copied and folded."""
    *_, last = axes, *stops(axes)
    return last


@dataclass
class Attention:
    """An attention that was found: its operands, and how scores become weights.

    Attributes:
        biases: tensors that are added to the scores, or bool tensors that keep where True.
        slopes: ALiBi: a tensor whose only axis is the head, and a factor.
        factors: operations and tensors of one element that the queries are scaled by.
        restores_nan: the model gives NaN for a query that sees no key, `gcu::attention` gives 0.
        split: the axes that show batch and heads apart; None: all of the lead is heads, the batch is 1.
    """

    q: Axes
    k: Axes
    v: Axes
    scale: float = 1.0
    soft_cap: float | Node = 0.0
    causal: bool = False
    offset: Any = 0
    window: int | None = None
    biases: list[Axes] = field(default_factory=list)
    slopes: tuple[Axes, float] | None = None
    factors: list[tuple[Any, Node]] = field(default_factory=list)
    restores_nan: bool = False
    split: Axes | None = None

    def settle(self, *others: Axes) -> str | None:
        """Choose `split`; the reason why the operands do not agree on batch and heads, or None."""
        apart = [one for one in (self.q, *others, self.k, self.v) if len(one.lead) > 1]
        self.split = min(apart, key=lambda one: len(one.lead), default=None)
        if any(len(one.lead) > 3 for one in (self.q, self.k, self.v)):
            return "there are more than five dimensions"
        if any(not same_size(one.repeat, 1) for one in (self.q, *others)):
            return "the queries' heads are repeated"
        if not same_size(self.k.repeat, self.v.repeat):
            return "keys and values are not repeated alike"
        if self.split is None:
            return None
        batch, heads = self.split.batch_and_heads()
        heads = heads * self.split.repeat
        if not isinstance(heads, int):
            return "the number of heads is a symbol"
        for one in (self.q, self.k, self.v, *others):
            if len(one.lead) > 1:
                b, h = one.batch_and_heads()
                if not (same_size(b, batch) and (same_size(h * one.repeat, heads) or self._groups(one, heads))):
                    return f"{one.node.name} has {b} x {h} heads, not {batch} x {heads}"
        return None

    def _groups(self, one: Axes, heads: Any) -> bool:
        """Whether these are fewer key heads, for groups of query heads (SDPA with `enable_gqa`)."""
        mine = one.batch_and_heads()[1] * one.repeat
        known = isinstance(heads, int) and isinstance(mine, int)
        return (one is self.k or one is self.v) and known and heads % mine == 0


def four(graph: Graph, axes: Axes, split: Axes | None) -> Node:
    """The tensor as [batch, heads, rows, columns]; a folded lead is taken apart as in `split`."""
    if len(axes.lead) == 2:
        return arranged(graph, axes.node, (*axes.lead, axes.rows, axes.columns))
    if len(axes.lead) == 3:
        grouped = arranged(graph, axes.node, (*axes.lead, axes.rows, axes.columns))
        batch, heads = axes.batch_and_heads()
        tail = (1 if d is None else size_of(graph, axes.node, d) for d in (axes.rows, axes.columns))
        sizes = [-1 if isinstance(batch, torch.SymInt) else batch, heads, *tail]
        return graph.call_function(aten.reshape.default, (grouped, sizes))
    (lead,) = axes.lead
    if split is None or lead is None:
        return arranged(graph, axes.node, (None, lead, axes.rows, axes.columns))
    folded = arranged(graph, axes.node, (lead, axes.rows, axes.columns))
    batch, heads = split.batch_and_heads()
    sizes = [-1 if isinstance(batch, torch.SymInt) else batch, heads * split.repeat // axes.repeat]
    tail = (1 if d is None else size_of(graph, axes.node, d) for d in (axes.rows, axes.columns))
    return graph.call_function(aten.reshape.default, (folded, [*sizes, *tail]))
