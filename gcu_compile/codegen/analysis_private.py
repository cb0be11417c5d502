"""The iteration space of a fused kernel as a chain of dimensions, and its accesses as strides along them.

Inductor gives every node of a kernel its own loop nest over the same number of elements. The places where those nests
(and the div and mod in their indices) cut the flat space are collected; where each cut divides the next, the kernel
has one chain of dimensions in which every index is affine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._inductor.loop_body import MemoryUsageType
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import FloorDiv, Identity, ModularIndexing

from gcu_compile.codegen.tiling import Pattern

LOADS = (MemoryUsageType.LOAD,)
STORES = (MemoryUsageType.STORE, MemoryUsageType.STORE_REDUCTION)
# A cut inside a row that leaves shorter runs than this is not made: slices of a few elements, each with its setup,
# cost more than gathering them.
SHORTEST_RUN = 32
INDEX_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Chain:
    """Cut points of the flat space, innermost first: (position as an expression, its size hint)."""

    cuts: tuple[tuple[sympy.Expr, int], ...]
    # Positions that fit no chain, as hints: what is cut there is a gather.
    uneven: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[sympy.Expr]:
        """Sizes of the dimensions, outermost first."""
        pairs = zip(self.cuts, self.cuts[1:], strict=False)
        return [V.graph.sizevars.simplify(FloorDiv(high, low)) for (low, _), (high, _) in pairs][::-1]

    @property
    def hints(self) -> list[int]:
        """The same as numbers."""
        return [high // low for (_, low), (_, high) in zip(self.cuts, self.cuts[1:], strict=False)][::-1]


def hint(expression: Any) -> int:
    """A size as a number: exact if static, else Inductor's guess."""
    return int(V.graph.sizevars.optimization_hint(expression))


def chain(nodes: Iterable[Any], numel: Any, rnumel: Any) -> Chain:
    """The chain of a kernel over `numel` outputs of `rnumel` reduced elements each (1: pointwise)."""
    total = numel * rnumel
    points: dict[int, sympy.Expr] = {1: sympy.S.One, hint(total): sympy.sympify(total)}
    points.setdefault(hint(rnumel), sympy.sympify(rnumel))
    needed, short, mixed = set(points), set(), set()

    def cut_at(position: sympy.Expr) -> None:
        """Two sizes that are equal only now, at the sizes that are compiled first, are no cut."""
        if not V.graph.sizevars.statically_known_equals(points.setdefault(hint(position), position), position):
            mixed.add(hint(position))

    for node in nodes:
        for variable, position, _ in _variables(node, numel, rnumel):
            cut_at(position)
            for index in _indices(node).values():
                for cut in _cuts_of(index, variable):
                    if hint(position * cut) >= SHORTEST_RUN:
                        cut_at(position * cut)
                    elif hint(position * cut) not in points:
                        short.add(hint(position * cut))

    def divides(small: int, large: int) -> bool:
        known = V.graph.sizevars.statically_known_multiple_of
        return large % small == 0 and known(points[large], points[small])

    kept: list[int] = []
    uneven = []
    for at in sorted(points):
        later = [p for p in needed if p > at]
        even = at not in mixed and (not kept or divides(kept[-1], at)) and all(divides(at, p) for p in later)
        if at in needed or even:
            while kept and not divides(kept[-1], at):
                uneven.append(kept.pop())
            kept.append(at)
        else:
            uneven.append(at)
    return Chain(tuple((points[at], at) for at in kept), tuple(sorted({*uneven, *(short - set(kept))})))


def patterns(nodes: Iterable[Any], numel: Any, rnumel: Any, found: Chain) -> list[Pattern]:
    """Strides of every access along the chain, outermost dimension first."""
    result = []
    for node in nodes:
        indirect, masked = bool(node._body.indirect_vars), bool(node._body.subblocks)
        variables = _variables(node, numel, rnumel)
        indices = _indices(node)
        for kinds, store in ((LOADS, False), (STORES, True)):
            for kind in kinds:
                for entry in node._body.memory_usage[kind]:
                    strides = _strides(indices[entry.index_name], variables, found)
                    index: frozenset[int] = frozenset()
                    if indirect and not store and V.graph.get_dtype(entry.buffer_name) in INDEX_DTYPES:
                        index = frozenset(d for d, stride in enumerate(strides) if stride != 0)
                    result.append(Pattern(strides, store, index))
        # Positions as values: parts of a loaded index, or compared to make the mask of a load.
        for entry in node._body.memory_usage[MemoryUsageType.INDEX_EXPR] if indirect or masked else ():
            strides = _strides(indices[entry.index_name], variables, found)
            along = frozenset(d for d, stride in enumerate(strides) if stride != 0)
            result.append(Pattern((0,) * len(strides), False, along if indirect else frozenset(), along))
    return result


def _indices(node: Any) -> dict[str, sympy.Expr]:
    """Indices by name, without the wrappers that keep a subexpression whole."""
    return {name: plain(index) for name, index in node._body.indexing_exprs.items()}


def plain(index: sympy.Expr) -> sympy.Expr:
    """`index` without `Identity`."""
    return index.replace(Identity, lambda inner: inner) if index.has(Identity) else index


def _variables(node: Any, numel: Any, rnumel: Any) -> list[tuple[sympy.Symbol, sympy.Expr, sympy.Expr]]:
    """(symbol, position, size) of a node's loops in the flat space of the kernel."""
    outer, inner = node.get_ranges()
    symbols = list(node._body.vars[0]), list(node._body.vars[1])
    position = sympy.S.One
    if not inner and hint(rnumel) != 1 and hint(sympy.prod(outer)) == hint(numel):
        position = sympy.sympify(rnumel)
    result = []
    for symbol, size in reversed([*zip(symbols[0], outer, strict=True), *zip(symbols[1], inner, strict=True)]):
        result.append((symbol, position, size))
        position = position * size
    return result


def _cuts_of(index: sympy.Expr, variable: sympy.Symbol) -> Iterable[sympy.Expr]:
    """Where div and mod cut one loop variable."""
    for part in index.atoms(FloorDiv, ModularIndexing):
        if part.args[0] == variable:
            yield part.args[1]
            if isinstance(part, ModularIndexing):
                yield part.args[1] * part.args[2]


def _strides(index: sympy.Expr, variables: list[Any], found: Chain) -> tuple[int | None, ...]:
    at_zero = {symbol: 0 for symbol, _, _ in variables}

    def value(position: int, steps: int) -> int | None:
        values = dict(at_zero)
        for symbol, start, size in variables:
            low, high = hint(start), hint(start) * hint(size)
            if low <= position < high:
                values[symbol] = steps * (position // low)
        moved = index.subs(values)
        # What is loaded at run time moves the address too, but not with the chain.
        moved = moved.subs({symbol: 0 for symbol in moved.free_symbols if symbol.name.startswith("indirect")})
        try:
            return hint(moved)
        except (TypeError, ValueError):
            return None

    strides: list[int | None] = []
    for (_, low), (_, high) in zip(found.cuts, found.cuts[1:], strict=False):
        base, one = value(low, 0), value(low, 1)
        last = value(low, high // low - 1)
        if base is None or one is None or last is None:
            strides.append(None)
            continue
        stride = one - base if high // low > 1 else 0
        strides.append(stride if last - base == stride * max(high // low - 1, 0) else None)
    return tuple(reversed(strides))
