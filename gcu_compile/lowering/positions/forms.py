"""The forms in which positions are known, and the reading of a graph into them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from gcu_compile.lowering.match import arguments_of, number_of
from gcu_compile.lowering.rule import value_of

EXACT_FLOATS = (torch.float32, torch.float64)  # hold every position below 2**24
SMALL = (torch.int8, torch.uint8, torch.int16)  # may wrap around


@dataclass(frozen=True)
class Affine:
    """`const + sum(coefficients[d] * index[d])` at every index of a tensor of that rank."""

    const: Any
    coefficients: tuple[Any, ...]

    @property
    def is_constant(self) -> bool:
        return not any(self.coefficients)

    def __add__(self, other: Affine) -> Affine:
        left, right = _aligned(self, other)
        return Affine(left.const + right.const, tuple(map(operator.add, left.coefficients, right.coefficients)))

    def __mul__(self, factor: Any) -> Affine:
        return Affine(self.const * factor, tuple(c * factor for c in self.coefficients))

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1


@dataclass(frozen=True)
class Condition:
    """All of `parts` are >= 0; where not `exact`, something unknown must hold as well.

    `inverse`: what this is the exact opposite of, where that is known better than this itself.
    """

    parts: tuple[Affine, ...] = ()
    exact: bool = True
    inverse: Condition | None = None

    def __and__(self, other: Condition) -> Condition:
        parts = tuple(part for part in (*self.parts, *other.parts) if not always(part))
        return Condition(parts, self.exact and other.exact)

    def __invert__(self) -> Condition:
        if self.inverse is not None:
            return self.inverse
        if self.truth is not None:
            return FALSE if self.truth else Condition()
        if self.exact and len(self.parts) == 1:
            return Condition((self.parts[0] * -1 - Affine(1, ()),))
        return Condition((), exact=False, inverse=self)

    @property
    def truth(self) -> bool | None:
        """True or False where it is the same everywhere."""
        if self.exact and all(always(part) for part in self.parts):
            return True
        return False if any(never(part) for part in self.parts) else None


@dataclass(frozen=True)
class TwoValued:
    """`if_true` where `condition` holds, else `if_false`; both are numbers."""

    condition: Condition
    if_true: float
    if_false: float

    def map(self, fn: Callable[[float], float]) -> TwoValued:
        return TwoValued(self.condition, fn(self.if_true), fn(self.if_false))


def at_least(value: Any, bound: int) -> bool:
    """Whether `value >= bound` is known without a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(value >= bound))


def always(part: Affine) -> bool:
    """Whether it is >= 0 at every index."""
    return at_least(part.const, 0) and all(not isinstance(c, torch.SymInt) and c >= 0 for c in part.coefficients)


def never(part: Affine) -> bool:
    """Whether it is < 0 at every index."""
    known = all(not isinstance(c, torch.SymInt) and c <= 0 for c in part.coefficients)
    return known and at_least(-part.const, 1)


def _aligned(left: Affine, right: Affine) -> tuple[Affine, Affine]:
    rank = max(len(left.coefficients), len(right.coefficients))
    return tuple(Affine(a.const, (0,) * (rank - len(a.coefficients)) + a.coefficients) for a in (left, right))


FALSE = Condition((Affine(-1, ()),))
READERS: dict[Any, Callable] = {}  # operation -> reader(positions, node, arguments), see readers.py


class Positions:
    """Reads nodes of one graph; every node once."""

    def __init__(self) -> None:
        self.known: dict[Node, Any] = {}

    def of(self, node: Any) -> Affine | Condition | TwoValued | None:
        """What is known of `node`, a node or a number."""
        if isinstance(node, bool):
            return Condition() if node else FALSE
        if isinstance(node, (int, float, torch.SymInt)):
            return Affine(node, ())
        if not isinstance(node, Node):
            return None
        if node not in self.known:
            self.known[node] = None  # until read: a cycle cannot be, a failure is unknown
            self.known[node] = self._read(node)
        return self.known[node]

    def condition(self, node: Any) -> Condition:
        """What is known of a bool tensor; nothing at all is an inexact condition without parts."""
        found = self.of(node)
        return found if isinstance(found, Condition) else Condition((), exact=False)

    def _read(self, node: Node):
        value = value_of(node)
        if node.op == "placeholder":
            return Affine(value, ()) if isinstance(value, torch.SymInt) else None
        if isinstance(value, torch.SymInt):
            return Affine(value, ())
        if not isinstance(value, torch.Tensor) or value.dtype in SMALL:
            return None
        if value.dtype.is_floating_point and (number := number_of(node)) is not None:
            return Affine(number, (0,) * value.dim())
        read = READERS.get(node.target) if node.op == "call_function" else None
        if read is None:
            return Condition((), exact=False) if value.dtype == torch.bool else None
        found = read(self, node, arguments_of(node))
        if found is None and value.dtype == torch.bool:
            return Condition((), exact=False)
        return found
