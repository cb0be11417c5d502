"""A small matcher of FX nodes, for what torch's own pattern matcher cannot say: optional casts and views in
between, alternatives that bind, numbers with a tolerance, symbolic sizes, and why a place *almost* matched.

    rms = Call(aten.mul.Tensor, Bind("x"), Call(aten.rsqrt.default, ...))      # commutative: either order
    found = find(rms, node)       # Found, Refusal("all but ... matched", near=True), or None

A pattern yields every way in which it fits a value; bindings are consistent (a name that occurs twice must bind
the same node). `find` first asks for a whole match; only if there is none does it ask again with one miss
allowed, and the match that got furthest then tells what was missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from gcu_compile.lowering.rule import Refusal, value_of

aten = torch.ops.aten
prims = torch.ops.prims

COMMUTATIVE = frozenset(
    {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.eq.Tensor}
    | {aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.logical_and.default, aten.logical_or.default}
)
CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})
COPIES = frozenset({aten.clone.default, aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default})
VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default}
    | {aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default}
)


@dataclass(frozen=True)
class Found:
    """One way in which a pattern fits: bindings by name, and the operations that it consumed, root first."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    miss: tuple[str, Any] | None = None
    tolerant: bool = False  # whether one miss may still be granted

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The binding, or `default` where an optional part was absent."""
        return self.bound.get(name, default)

    def inner_users(self) -> list[Node]:
        """Consumed operations, the root excepted, whose value something outside the match still needs."""
        mine = set(self.nodes)
        return [node for node in self.nodes[1:] if not set(node.users) <= mine]

    def _with(self, name: str, value: Any) -> Found | None:
        if name in self.bound:
            return self if _same(self.bound[name], value) else None
        return Found({**self.bound, name: value}, self.nodes, self.miss, self.tolerant)

    def _consuming(self, node: Node) -> Found:
        return Found(self.bound, (*self.nodes, node), self.miss, self.tolerant)


class Pattern:
    """Base of all patterns. `a | b` is "a, or else b"."""

    def __or__(self, other: Pattern) -> Either:
        return Either(self, other)

    def matches(self, value: Any, found: Found = Found()) -> Iterator[Found]:
        """Every extension of `found` with which `value` fits; one with a miss if none and `found` is tolerant."""
        fitted = False
        for extended in self._matches(value, found):
            fitted = True
            yield extended
        if not fitted and found.tolerant and found.miss is None and found.nodes:
            yield Found(found.bound, found.nodes, (self.missing(value), value), True)

    def _matches(self, value: Any, found: Found) -> Iterator[Found]:
        raise NotImplementedError

    def missing(self, value: Any) -> str:
        """What `value` lacks."""
        return f"{self} (found {_name(value)})"


@dataclass(frozen=True)
class Bind(Pattern):
    """Any tensor, by name. `check(value)` returns the reason why it does not fit, or None."""

    name: str
    check: Callable[[Node], str | None] | None = None

    def _matches(self, value, found):
        if isinstance(value, Node) and not (self.check and self.check(value)):
            extended = found._with(self.name, value)
            if extended:
                yield extended

    def missing(self, value):
        reason = self.check(value) if self.check and isinstance(value, Node) else None
        return f"{self.name}: {reason}" if reason else f"{self.name} (found {_name(value)})"


@dataclass(frozen=True)
class Anything(Pattern):
    """Any argument, unbound."""

    def _matches(self, value, found):
        yield found


@dataclass(frozen=True)
class Number(Pattern):
    """A Python number or a tensor that holds one (see `number_of`): bound to `name`, or equal to `value`.

    `check(number)` returns the reason why it does not fit, or None.
    """

    name: str = ""
    value: float | None = None
    tolerance: float = 1e-6
    check: Callable[[float], str | None] | None = None

    def _matches(self, value, found):
        number = number_of(value)
        if number is None or (self.check and self.check(number)):
            return
        if self.value is not None and not math.isclose(number, self.value, rel_tol=self.tolerance):
            return
        extended = found._with(self.name, number) if self.name else found
        if extended:
            yield extended

    def missing(self, value):
        wanted = self.name or "the number"
        number = number_of(value)
        if number is not None and self.check and (reason := self.check(number)):
            return f"{wanted}: {reason}"
        return f"{wanted}{'' if self.value is None else f' {self.value:g}'} (found {_name(value)})"


@dataclass(frozen=True)
class Exactly(Pattern):
    """An argument equal to `value`."""

    value: Any

    def _matches(self, value, found):
        if not isinstance(value, Node) and value == self.value:
            yield found

    def missing(self, value):
        return f"the argument {self.value!r} (found {_name(value)})"


class Call(Pattern):
    """A call of one of `targets` with these arguments.

    Args:
        targets: an overload or several.
        args: patterns or plain values, one per positional argument; missing ones are not looked at. A call's
            own defaults count as given.
        name: also binds the node.
        single_use: nothing else may need this value.
        check: node -> reason why it does not fit, or None.
        kwargs: likewise by name.
    """

    def __init__(self, targets, *args, name: str = "", single_use: bool = False, check=None, **kwargs):
        self.targets = tuple(targets) if isinstance(targets, Sequence) else (targets,)
        self.args = tuple(map(_pattern, args))
        self.kwargs = {key: _pattern(value) for key, value in kwargs.items()}
        self.name, self.single_use, self.check = name, single_use, check

    def __repr__(self):
        return " or ".join(dict.fromkeys(str(target) for target in self.targets))

    def _matches(self, value, found):
        if self._reason(value):
            return
        start = found._consuming(value)
        if self.name:
            start = start._with(self.name, value)
        if start is None:
            return
        given = arguments_of(value)
        orders = [self.args]
        if value.target in COMMUTATIVE and len(self.args) == 2 and self.args[0] != self.args[1]:
            orders.append(self.args[::-1])
        for order in orders:
            pairs = [*zip(order, given.values(), strict=False)]
            pairs += [(pattern, given.get(key)) for key, pattern in self.kwargs.items()]
            yield from _all(pairs, start)

    def _reason(self, value) -> str | None:
        if not isinstance(value, Node) or value.op != "call_function" or value.target not in self.targets:
            return f"{self} (found {_name(value)})"
        if self.single_use and len(value.users) > 1:
            return f"only one use of {value.name}, which has {len(value.users)}"
        return self.check(value) if self.check else None

    def missing(self, value):
        return self._reason(value) or f"the arguments of {self}"


class Either(Pattern):
    """The first of these that fit, and then the others."""

    def __init__(self, *options: Pattern):
        self.options = tuple(itertools.chain(*(o.options if isinstance(o, Either) else (o,) for o in options)))

    def __repr__(self):
        return " or ".join(map(repr, self.options))

    def _matches(self, value, found):
        for option in self.options:
            yield from option._matches(value, found)
        if found.tolerant and found.miss is None:
            for option in self.options:
                if isinstance(option, Call) and option._reason(value) is None:
                    yield from option.matches(value, found)


class Through(Pattern):
    """`inner`, with any number of casts, views and copies between it and its user.

    Args:
        over: the operations looked through, e.g. `CASTS | COPIES`.
    """

    def __init__(self, inner: Pattern, over: frozenset = CASTS | COPIES):
        self.inner, self.over = inner, over

    def __repr__(self):
        return repr(self.inner)

    def _matches(self, value, found):
        while True:
            yield from self.inner._matches(value, found)
            if not isinstance(value, Node) or value.op != "call_function" or value.target not in self.over:
                return
            found, value = found._consuming(value), value.args[0]

    def missing(self, value):
        return self.inner.missing(strip(value, self.over))


def find(pattern: Pattern, node: Node, near: int = 2) -> Found | Refusal | None:
    """How `pattern` fits at `node`.

    Args:
        near: operations that must have matched for a failure to be worth telling.

    Returns:
        The first whole match; or a near-miss `Refusal` where all but one part matched; or None.
    """
    for found in pattern.matches(node):
        return found
    tried = [f for f in pattern.matches(node, Found(tolerant=True)) if f.miss]
    best = max(tried, key=lambda found: len(found.nodes), default=None)
    if best is None or len(best.nodes) < near:
        return None
    reason, value = best.miss
    where = value.name if isinstance(value, Node) else best.nodes[-1].name
    return Refusal(f"all but {reason} matched, at node {where}", near=True)


def strip(value: Any, over: frozenset = CASTS | COPIES) -> Any:
    """`value` behind the operations of `over`."""
    while isinstance(value, Node) and value.op == "call_function" and value.target in over:
        value = value.args[0]
    return value


def number_of(value: Any) -> float | int | None:
    """The one number that an argument is: a Python number, a filled tensor, or a constant of one element."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return value
    value = strip(value, CASTS | COPIES | VIEWS)
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        constant = getattr(value.graph.owning_module, str(value.target), None)
        plain = isinstance(constant, torch.Tensor) and not torch._subclasses.fake_tensor.is_fake(constant)
        if not plain or constant.numel() != 1 or constant.dtype == torch.bool:
            return None
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            return constant.item()
    if value.target is aten.full.default:
        return number_of(value.args[1])
    if value.target is aten.scalar_tensor.default:
        return number_of(value.args[0])
    return None


def arguments_of(node: Node) -> dict[str, Any]:
    """A call's arguments by name, in the order of the schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):  # getitem and arithmetic of sizes
        return dict(enumerate(node.args))
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given = {argument.name: given.get(argument.name) for argument in schema}
    given.update(zip(given, node.args, strict=False))
    given.update(node.kwargs)
    return given


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a node's value, or None."""
    value = value_of(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def _all(pairs: list[tuple[Pattern, Any]], found: Found) -> Iterator[Found]:
    if not pairs:
        yield found
        return
    (pattern, value), *rest = pairs
    for extended in pattern.matches(value, found):
        yield from _all(rest, extended)


def _pattern(value: Any) -> Pattern:
    return value if isinstance(value, Pattern) else Exactly(value)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, (int, float)):
        return left == right
    return left is right or (not isinstance(left, Node) and left == right)


def _name(value: Any) -> str:
    if isinstance(value, Node):
        return str(value.target) if value.op == "call_function" else f"{value.op} {value.name}"
    return repr(value)
