"""Where the dimensions of a tensor come from, through views, permutes and copies.

    bmm operand [batch * heads, length, size]  <- view <- clone <- permute <- x [batch, length, heads, size]

`sources` walks back from a node over operations that only move elements, and tells at each stop which dimensions of
the earlier tensor each group of dimensions is made of: here ((0, 2), (1,), (3,)). Dimensions of size 1 belong to
nobody. A dimension that `expand` repeats is counted in `repeats`, so that repeated key heads are seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gcu_compile.lowering.match import COPIES
from gcu_compile.lowering.rule import same_size, value_of

aten = torch.ops.aten
Groups = tuple[tuple[int, ...], ...]
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
SQUEEZES = frozenset({aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default})


@dataclass(frozen=True)
class Stop:
    """`groups[i]`: the dimensions of `node` that group i of the first node is made of, outermost first.

    `repeats`: sizes of innermost repeated dimensions of group i, by i: each element occurs so often in a row.
    """

    node: Node
    groups: Groups
    repeats: tuple[tuple[int, Any], ...] = ()


def sources(node: Node, groups: Groups) -> Iterator[Stop]:
    """`node` itself, then every earlier tensor with the same elements, as far as it can be followed.

    Args:
        groups: the dimensions of `node` to follow; those of one group may be folded into one on the way.
    """
    shape = value_of(node).shape
    stop = Stop(node, tuple(tuple(d for d in group if not _one(shape[d])) for group in groups))
    while stop is not None:
        yield stop
        stop = _back(stop)


def _one(size: Any) -> bool:
    return same_size(size, 1)


def _back(stop: Stop) -> Stop | None:
    node = stop.node
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    before, after = value_of(source), value_of(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if node.target in COPIES:
        return Stop(source, stop.groups, stop.repeats)
    if node.target is aten.permute.default:
        dims = [d % before.dim() for d in node.args[1]]
        return Stop(source, _renamed(stop.groups, {new: (old,) for new, old in enumerate(dims)}), stop.repeats)
    if node.target is aten.expand.default:
        return _before_expand(stop, source, before, after)
    if node.target in RESHAPES or node.target in SQUEEZES:
        groups = _before_view(stop.groups, before.shape, after.shape)
        return groups and Stop(source, groups, stop.repeats)
    return None


def _renamed(groups: Groups, names: dict[int, tuple[int, ...]]) -> Groups:
    return tuple(tuple(new for old in group for new in names[old]) for group in groups)


def _before_expand(stop: Stop, source: Node, before: torch.Tensor, after: torch.Tensor) -> Stop | None:
    added = after.dim() - before.dim()
    groups, repeats = list(stop.groups), dict(stop.repeats)
    for d, size in enumerate(after.shape):
        if d >= added and same_size(before.shape[d - added], size):
            continue
        if d >= added and not _one(before.shape[d - added]):
            return None  # symbolic: may or may not be repeated
        (number,) = [n for n, group in enumerate(groups) if d in group] or [None]
        if number is None:
            continue
        if groups[number][-1] != d or number in repeats:
            return None  # repeated as a whole, not element by element
        groups[number], repeats[number] = groups[number][:-1], size
    moved = tuple(tuple(d - added for d in group) for group in groups)
    return Stop(source, moved, tuple(repeats.items()))


def _before_view(groups: Groups, before: Any, after: Any) -> Groups | None:
    segments = _segments(before, after)
    if segments is None:
        return None
    groups = list(groups)
    for old, new in segments:
        if len(new) == 1:
            groups = [_spliced(group, new, old) for group in groups]
        elif len(old) == 1:
            if not any(_run(group, new) is not None for group in groups):
                return None  # a dimension of the node is part of a dimension of the source
            groups = [_spliced(group, new, old) for group in groups]
        else:
            return None
    # _spliced marks new names as negative, so that old and new ones are not mixed up
    return tuple(tuple(-1 - d for d in group) for group in groups)


def _run(group: tuple[int, ...], part: tuple[int, ...]) -> int | None:
    for start in range(len(group) - len(part) + 1):
        if group[start : start + len(part)] == part:
            return start
    return None


def _spliced(group: tuple[int, ...], part: tuple[int, ...], by: tuple[int, ...]) -> tuple[int, ...]:
    start = _run(group, part)
    if start is None:
        return group
    return group[:start] + tuple(-1 - d for d in by) + group[start + len(part) :]


def _segments(before: Any, after: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Runs of dimensions (sizes of 1 left out) with equal products: [(old dims, new dims), ...]."""
    old = [d for d, size in enumerate(before) if not _one(size)]
    new = [d for d, size in enumerate(after) if not _one(size)]
    found = []
    while old and new:
        a, b = [old.pop(0)], [new.pop(0)]
        left, right = before[a[0]], after[b[0]]
        while not same_size(left, right):
            grow_left = _divides(left, right)
            if grow_left and old:
                a.append(old.pop(0))
                left = left * before[a[-1]]
            elif not grow_left and new:
                b.append(new.pop(0))
                right = right * after[b[-1]]
            else:
                return None
        found.append((tuple(a), tuple(b)))
    return found if not old and not new else None


def _divides(left: Any, right: Any) -> bool:
    """Which of two unequal products is to grow: whether `left` is the smaller, where that is known."""
    if isinstance(left, int) and isinstance(right, int):
        return left < right
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(right % left == 0)) or bool(statically_known_true(left < right))


def size_of(graph: torch.fx.Graph, node: Node, dim: int) -> Any:
    """The size of a dimension as an argument: an int, or a node that reads it."""
    size = value_of(node).shape[dim]
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return graph.call_function(aten.sym_size.int, (node, dim)) if known is None else known
    return int(size)


def arranged(graph: torch.fx.Graph, node: Node, dims: tuple[int | None, ...]) -> Node:
    """`node` with exactly these of its dimensions, in this order; None makes one of size 1.

    Dimensions of `node` that are not named have size 1.
    """
    rank = value_of(node).dim()
    spare = [d for d in range(rank) if d not in dims]
    order = []
    for d in dims:  # an unnamed dimension of size 1 serves where one is wanted
        order.append(d if d is not None else spare.pop(0) if spare else None)
    for d in sorted(spare, reverse=True):
        node = graph.call_function(aten.squeeze.dims, (node, [d]))
        order = [o if o is None or o < d else o - 1 for o in order]
    there = [d for d in order if d is not None]
    if there != list(range(len(there))):
        node = graph.call_function(aten.permute.default, (node, there))
    for place, d in enumerate(order):
        if d is None:
            node = graph.call_function(aten.unsqueeze.default, (node, place))
    return node
