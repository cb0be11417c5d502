"""What is known of the result of one operation, from what is known of its arguments; one reader per operation.

A reader gets the `Positions` that asks, the node, and the node's arguments by name; it returns an `Affine`, a
`Condition`, a `TwoValued`, or None. To follow one more operation, add a reader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from gcu_compile.lowering.match import CASTS, COPIES
from gcu_compile.lowering.positions.forms import (
    EXACT_FLOATS,
    FALSE,
    READERS,
    Affine,
    Condition,
    TwoValued,
    always,
    at_least,
)
from gcu_compile.lowering.rule import same_shape, same_size, value_of

aten = torch.ops.aten
prims = torch.ops.prims


def _reads(*targets):
    def register(fn):
        READERS.update(dict.fromkeys(targets, fn))
        return fn

    return register


def _each(found: Any, fn: Callable[[tuple], tuple]) -> Any:
    """`found` with its coefficients rearranged by `fn`."""
    if isinstance(found, Affine):
        return Affine(found.const, fn(found.coefficients))
    if isinstance(found, Condition):
        return Condition(tuple(_each(p, fn) for p in found.parts), found.exact, _each(found.inverse, fn))
    if isinstance(found, TwoValued):
        return TwoValued(_each(found.condition, fn), found.if_true, found.if_false)
    return None


def _padded(coefficients: tuple, rank: int) -> tuple:
    return (0,) * (rank - len(coefficients)) + coefficients


@_reads(prims.iota.default)
def _iota(self, node, given):
    start = value_of(given["start"]) if isinstance(given["start"], Node) else given["start"]
    return None if isinstance(given["step"], Node) else Affine(start, (given["step"],))


@_reads(aten.full.default, aten.scalar_tensor.default)
def _full(self, node, given):
    number = given.get("fill_value", given.get("s"))
    number = value_of(number) if isinstance(number, Node) else number
    if value_of(node).dtype == torch.bool:
        return Condition() if number else FALSE
    return Affine(number, (0,) * value_of(node).dim())


@_reads(*(CASTS | COPIES))
def _cast(self, node, given):
    found, to = self.of(node.args[0]), value_of(node).dtype
    came = value_of(node.args[0]).dtype
    if came == to:
        return found
    if to == torch.bool:
        if isinstance(found, Affine) and found.is_constant and not isinstance(found.const, torch.SymInt):
            return Condition() if found.const else FALSE
        return None
    if isinstance(found, Condition):
        truth = found.truth
        return TwoValued(found, 1, 0) if truth is None else Affine(int(truth), (0,) * value_of(node).dim())
    if isinstance(found, Affine) and (found.is_constant or to in EXACT_FLOATS or not to.is_floating_point):
        return found if came in EXACT_FLOATS or not came.is_floating_point or to.is_floating_point else None
    return found if isinstance(found, TwoValued) and to.is_floating_point else None


@_reads(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def _add(self, node, given):
    sign = -1 if node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1
    left, right = self.of(node.args[0]), self.of(node.args[1])
    if given.get("alpha", 1) != 1:
        return None
    if isinstance(left, Affine) and isinstance(right, Affine):
        return left + right * sign
    if isinstance(left, TwoValued) and _constant(right):
        return left.map(lambda x: x + sign * right.const)
    if isinstance(right, TwoValued) and _constant(left):
        return right.map(lambda x: left.const + sign * x)
    return None


@_reads(aten.mul.Tensor, aten.mul.Scalar)
def _mul(self, node, given):
    left, right = self.of(node.args[0]), self.of(node.args[1])
    if _constant(left):
        left, right = right, left
    if not _constant(right):
        both = isinstance(left, Condition) and isinstance(right, Condition)
        return left & right if both and value_of(node).dtype == torch.bool else None
    if isinstance(left, Affine):
        return left * right.const
    return left.map(lambda x: x * right.const) if isinstance(left, TwoValued) else None


@_reads(aten.neg.default)
def _neg(self, node, given):
    found = self.of(node.args[0])
    return found * -1 if isinstance(found, Affine) else None


def _constant(found: Any) -> bool:
    return isinstance(found, Affine) and found.is_constant and not isinstance(found.const, torch.SymInt)


COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


@_reads(*(getattr(getattr(aten, name), kind) for name in COMPARISONS for kind in ("Tensor", "Scalar")))
def _compare(self, node, given):
    left, right = self.of(node.args[0]), self.of(node.args[1])
    if not isinstance(left, Affine) or not isinstance(right, Affine):
        return None
    name, ahead = node.target._schema.name.split("::")[1], right - left
    whole = all(not isinstance(x, float) or x.is_integer() for x in (ahead.const, *ahead.coefficients))
    if name in ("lt", "gt", "ne") and not whole:
        return None
    one = Affine(1, ())
    if name in ("le", "lt"):
        return Condition((ahead if name == "le" else ahead - one,)) & Condition()
    if name in ("ge", "gt"):
        return Condition((ahead * -1 if name == "ge" else ahead * -1 - one,)) & Condition()
    if name == "eq":
        return Condition((ahead, ahead * -1)) & Condition()
    if not ahead.is_constant:
        return None
    if same_size(ahead.const, 0):
        return FALSE
    return Condition() if at_least(ahead.const, 1) or at_least(-ahead.const, 1) else None


@_reads(aten.bitwise_and.Tensor, aten.logical_and.default)
def _and(self, node, given):
    if value_of(node).dtype != torch.bool:
        return None
    return self.condition(node.args[0]) & self.condition(node.args[1])


@_reads(aten.bitwise_or.Tensor, aten.logical_or.default)
def _or(self, node, given):
    left, right = self.condition(node.args[0]), self.condition(node.args[1])
    for one, other in ((left, right), (right, left)):
        if one.truth is not None:
            return Condition() if one.truth else other
    return None


@_reads(aten.bitwise_not.default, aten.logical_not.default)
def _not(self, node, given):
    return ~self.condition(node.args[0]) if value_of(node).dtype == torch.bool else None


@_reads(aten.where.self)
def _where(self, node, given):
    condition, then, other = self.condition(node.args[0]), self.of(node.args[1]), self.of(node.args[2])
    if value_of(node).dtype == torch.bool:
        if isinstance(other, Condition) and other.truth is False:
            return condition & (then if isinstance(then, Condition) else Condition((), False))
        return None
    if not (_constant(then) and _constant(other)):
        return None
    if condition.truth is not None:
        return then if condition.truth else other
    return TwoValued(condition, then.const, other.const)


@_reads(aten.unsqueeze.default)
def _unsqueeze(self, node, given):
    dim = given["dim"] % value_of(node).dim()
    rank = value_of(node).dim() - 1
    return _each(self.of(node.args[0]), lambda c: (p := _padded(c, rank))[:dim] + (0,) + p[dim:])


@_reads(aten.expand.default)
def _expand(self, node, given):
    return self.of(node.args[0])  # broadcast dimensions have coefficient 0: their only index is 0


@_reads(aten.permute.default)
def _permute(self, node, given):
    return _each(self.of(node.args[0]), lambda c: tuple(_padded(c, len(given["dims"]))[d] for d in given["dims"]))


@_reads(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.dim, aten.squeeze.dims)
def _view(self, node, given):
    """Views that only add or drop dimensions of size 1."""
    before, after, found = value_of(node.args[0]), value_of(node), self.of(node.args[0])
    kept = [d for d, size in enumerate(before.shape) if not same_size(size, 1)]
    there = [d for d, size in enumerate(after.shape) if not same_size(size, 1)]
    pairs = [(before.shape[a], after.shape[b]) for a, b in zip(kept, there, strict=False)]
    if not same_shape(before, after) and (len(kept) != len(there) or not all(same_size(*pair) for pair in pairs)):
        return None

    def moved(coefficients):
        old, new = _padded(coefficients, before.dim()), [0] * after.dim()
        for source, target in zip(kept, there, strict=True):
            new[target] = old[source]
        return tuple(new)

    return _each(found, moved)


@_reads(aten.slice.Tensor)
def _slice(self, node, given):
    found, rank = self.of(node.args[0]), value_of(node).dim()
    dim, start, step = given["dim"] % rank, given["start"] or 0, given["step"]
    start = value_of(start) if isinstance(start, Node) else start
    if step != 1 or not at_least(start, 0):
        return None
    return _shifted(found, dim, start, rank)


def _shifted(found: Any, dim: int, start: Any, rank: int) -> Any:
    if isinstance(found, Affine):
        coefficients = _padded(found.coefficients, rank)
        return Affine(found.const + coefficients[dim] * start, coefficients)
    if isinstance(found, Condition):
        inverse = _shifted(found.inverse, dim, start, rank)
        return Condition(tuple(_shifted(part, dim, start, rank) for part in found.parts), found.exact, inverse)
    if isinstance(found, TwoValued):
        return TwoValued(_shifted(found.condition, dim, start, rank), found.if_true, found.if_false)
    return None


@_reads(aten.select.int)
def _select(self, node, given):
    rank = value_of(node).dim() + 1
    dim, index = given["dim"] % rank, given["index"]
    if isinstance(index, Node) or index < 0:
        return None
    shifted = _shifted(self.of(node.args[0]), dim, index, rank)
    return _each(shifted, lambda c: (p := _padded(c, rank))[:dim] + p[dim + 1 :])


@_reads(aten.cat.default)
def _cat(self, node, given):
    """Pieces that continue one affine form; a piece of one index fits any slope."""
    rank = value_of(node).dim()
    dim, pieces, slopes, offset = (given["dim"] or 0) % rank, [], [], 0
    for piece in given["tensors"]:
        found, size = self.of(piece), value_of(piece).shape[dim]
        if not isinstance(found, Affine):
            return None
        coefficients = _padded(found.coefficients, rank)
        if not same_size(size, 1):
            slopes.append(coefficients[dim])
        pieces.append((found.const, coefficients[:dim] + coefficients[dim + 1 :], offset))
        offset = offset + size
    if not slopes or any(slope != slopes[0] for slope in slopes):
        return None
    starts = [const - slopes[0] * offset for const, _, offset in pieces]
    rest = pieces[0][1]
    if not all(same_size(start, starts[0]) and piece[1] == rest for start, piece in zip(starts, pieces, strict=True)):
        return None
    return Affine(starts[0], rest[:dim] + (slopes[0],) + rest[dim:])


@_reads(aten.cumsum.default)
def _cumsum(self, node, given):
    """A running sum of a constant."""
    found, rank = self.of(node.args[0]), value_of(node).dim()
    if isinstance(found, Condition) and found.truth is not None:
        found = Affine(int(found.truth), ())
    if not _constant(found) or rank == 0 or value_of(node).dtype.is_floating_point and not exact(node):
        return None
    coefficients = [0] * rank
    coefficients[given["dim"]] = found.const
    return Affine(found.const, tuple(coefficients))


@_reads(aten.index.Tensor)
def _index(self, node, given):
    """x[a, b]: indices put into the form of x. Negative ones, which count from the end, are not followed."""
    found, indices = self.of(node.args[0]), given["indices"]
    truth = found.truth if isinstance(found, Condition) else None
    if truth is not None:
        return found
    if not isinstance(found, Affine):
        return None
    if found.is_constant:
        return Affine(found.const, ())
    places = [self.of(index) for index in indices]
    if len(places) != value_of(node.args[0]).dim() or not all(isinstance(place, Affine) for place in places):
        return None
    if not all(always(place) for place in places):
        return None
    return sum((p * c for p, c in zip(places, found.coefficients, strict=True)), Affine(found.const, ()))


def exact(node: Node) -> bool:
    """Whether the dtype of a node holds every position."""
    dtype = value_of(node).dtype
    return dtype in EXACT_FLOATS or not dtype.is_floating_point
