"""Split of qkv, norms of q and k, rotary embedding and the write into the cache, around an attention that is opaque.

    q, k, v = qkv.split(...);  q, k = rotary(norm(q)), rotary(norm(k));  token = write(k, v, *where);  ... q ... token
    -> q, token = fused(qkv, cos_sin, positions, q_norm, k_norm, heads, head_dim, interleaved, eps, *where)

A serving engine keeps its caches outside of the graph, and writes them by an operation of its own that is found again
by `where` (a layer's name). Who brings such an engine says in `known` what of its operations the rule may fuse with.

Arithmetic is float32 from qkv to the results, which are rounded once: what Inductor makes of the chain, too.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from gcu_compile.kernels.attention import rope
from gcu_compile.lowering import fakes
from gcu_compile.lowering.match import VIEWS, Bind, Call, Found, Through, arguments_of, dtype_of, find, strip
from gcu_compile.lowering.rule import Refusal, Rule, same_size, value_of
from gcu_compile.lowering.rules.elementwise import LOOSE, MUL, RMS, TURNED, over_last_dimension

aten = torch.ops.aten
NAME = "rope_and_cache"
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
PLAIN = LOOSE | RESHAPES
INDEXED = (aten.index.Tensor, aten.index_select.default, aten.embedding.default)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NORM = Call(MUL, Through(RMS, LOOSE), Through(Bind("weight"), LOOSE | VIEWS))
OTHER = Call(
    aten.add.Tensor, Call(MUL, Bind("two"), Bind("cos")), Call(MUL, Bind("one"), Bind("sin"))
)  # the second half of what `TURNED` begins

# (key, value, *where) -> token, an operation that writes a cache -> the fused operation, as above.
known: dict[Any, Any] = {}


@dataclass(frozen=True)
class Heads:
    """Rotated heads: what columns of which projection they were, and how they were turned.

    Attributes:
        source, start, stop: the projection [tokens, columns] and the columns.
        size: of a head.
        angles, positions: cosines and sines [rows, rotary], and the row of each token; None: row t is token t.
        interleaved: pairs of neighbours, see `rope.rotate`.
        norm, eps: weight of the RMS norm before it, or None.
    """

    source: Node
    start: int
    stop: int
    size: int
    angles: Node
    positions: Node | None
    interleaved: bool
    norm: Node | None
    eps: float


@dataclass(frozen=True)
class Match:
    """`query`: the node of the rotated queries. `at`: the earliest place of the fused operation's results."""

    query: Node
    at: Node
    q: Heads
    k: Heads
    where: tuple[Any, ...]


def _near(reason: str) -> Refusal:
    return Refusal(reason, near=True)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _piece(node: Any) -> tuple[Any, int, int, int]:
    """(source, start, stop, step): which elements of the last dimension of `source` these are.

    Casts and copies are looked through, and reshapes that leave the last dimension alone.
    """
    start, stop, step = 0, None, 1
    while True:
        node = strip(node, LOOSE)
        if _is(node, *RESHAPES, aten.unsqueeze.default):
            if not same_size(value_of(node).shape[-1], value_of(node.args[0]).shape[-1]):
                break
            node = node.args[0]
            continue
        if not _is(node, aten.slice.Tensor):
            break
        source, dim, begin, end, stride = [*node.args, *[None] * 4][:5]
        last, size = value_of(source).dim() - 1, value_of(source).shape[-1]
        begin, end, stride = begin or 0, size if end is None else end, stride or 1
        if (dim or 0) % (last + 1) != last or not all(isinstance(one, int) for one in (size, begin, end)):
            break
        begin, end = (max(one + size, 0) if one < 0 else min(one, size) for one in (begin, end))
        stop = end if stop is None else min(begin + stop * stride, end)
        start, step, node = begin + start * stride, step * stride, source
    return node, start, value_of(node).shape[-1] if stop is None else stop, step


def _turned(node: Node) -> tuple[Node, int, Node, Node, bool] | Refusal | None:
    """(what is rotated [tokens, heads, size], size of the rotation, cosines, sines, interleaved)"""
    node, rest = strip(node, PLAIN), None
    if _is(node, aten.cat.default) and value_of(node).dim() == 3:  # halves, or what is rotated and the rest
        *parts, rest = node.args[0]
        if len(parts) == 1 and not _is(strip(parts[0], LOOSE), aten.sub.Tensor):
            node = strip(parts[0], PLAIN)
        elif len(parts) == 1:
            rest = None
        else:
            node = None if len(parts) != 2 else node
    if not _is(node, aten.cat.default):
        return None
    inner, last = node.args[0][:2], value_of(node).dim() - 1
    interleaved = last == 3
    if [*node.args, 0][1] % (last + 1) != last:
        return None
    if interleaved:
        ones = [strip(one, LOOSE) for one in inner]
        if not all(_is(one, *VIEWS) and value_of(one).shape[-1] == 1 for one in ones):
            return None
        inner = [one.args[0] for one in ones]
    first, second = (strip(one, LOOSE) for one in inner)
    first = find(TURNED, first, near=99) if isinstance(first, Node) else None
    if not isinstance(first, Found) or not isinstance(second, Node):
        return None
    again = find(OTHER, second, near=99)
    if not isinstance(again, Found):
        return None
    if any(strip(again[name], LOOSE) is not strip(first[name], LOOSE) for name in ("one", "two", "cos", "sin")):
        return _near("the two halves are not turned by the same angles")
    x, begin, end, step = _piece(first["one"])
    other = _piece(first["two"])
    rotary = 2 * (value_of(first["one"]).shape[-1])
    expected = (x, 1, rotary, 2) if interleaved else (x, rotary // 2, rotary, 1)
    mine = (0, rotary, 2) if interleaved else (0, rotary // 2, 1)
    if (begin, min(end, rotary), step) != mine or (*other[:2], min(other[2], rotary), other[3]) != expected:
        return _near("the halves that are turned are not those of one head's beginning")
    size = value_of(x).shape[-1]
    if rest is None:
        return (x, rotary, first["cos"], first["sin"], interleaved) if rotary == size else None
    if _piece(rest) != (x, rotary, size, 1):
        return _near("what is not rotated is not the rest of the head")
    return x, rotary, first["cos"], first["sin"], interleaved


def _angles(cos: Node, sin: Node, tokens: Any, rotary: int) -> tuple[Node, Node | None] | Refusal:
    """(cosines and sines, positions) of which these are each token's."""
    for one in (cos, sin):
        value = value_of(one)
        if value.dim() != 3 or not same_size(value.shape[0], tokens) or value.shape[1:] != (1, rotary // 2):
            return _near("cosines and sines are not one row for all heads of a token")
    rows, *place = _piece(cos)
    if place != [0, rotary // 2, 1] or _piece(sin) != (rows, rotary // 2, rotary, 1):
        return _near("cosines and sines are not the two halves of one tensor's rows")
    value = value_of(rows)
    if value.dim() != 2 or value.shape[1] != rotary or not same_size(value.shape[0], tokens):
        return _near("cosines and sines are not the two halves of one tensor's rows")
    if not _is(rows, *INDEXED):
        return rows, None
    if rows.target is aten.index.Tensor:
        table, positions = rows.args[0], list(rows.args[1])
        positions = positions[0] if len(positions) == 1 else None
    elif rows.target is aten.index_select.default:
        table, positions = rows.args[0], rows.args[2] if rows.args[1] == 0 else None
    else:
        table, positions = rows.args[0], rows.args[1]
    fits = positions is not None and value_of(positions).dim() == 1 and dtype_of(positions) == torch.int64
    return (strip(table, LOOSE), positions) if fits and value_of(table).dim() == 2 else (rows, None)


def _heads(node: Node, tokens: Any) -> Heads | Refusal | None:
    """`node` [tokens, heads, size], if it is rotated heads of a projection."""
    turned = _turned(node)
    if not isinstance(turned, tuple):
        return turned
    x, rotary, cos, sin, interleaved = turned
    angles = _angles(cos, sin, tokens, rotary)
    if isinstance(angles, Refusal):
        return angles
    norm, eps = None, 0.0
    source, start, stop, step = _columns(x)
    if value_of(source).dim() != 2:
        found = find(NORM, strip(x, LOOSE), near=99)
        if not isinstance(found, Found):
            return _near(f"what is rotated is not columns of a projection, nor their norm ({x.name})")
        size, norm, eps = value_of(x).shape[-1], found.get("weight"), found["eps"]
        normed = value_of(strip(found["x"], LOOSE))
        if over_last_dimension(found) or not same_size(normed.shape[-1], size) or normed.dim() != 3:
            return _near("the norm is not one of each head")
        if norm is None or value_of(norm).dim() != 1 or not same_size(value_of(norm).shape[0], size):
            return _near("the norm's weight is not one of each value of a head")
        if isinstance(eps, Node):
            return _near("the norm's epsilon is no number")
        source, start, stop, step = _columns(strip(found["x"], LOOSE))
    if value_of(source).dim() != 2 or not same_size(value_of(source).shape[0], tokens) or step != 1:
        return _near("what is rotated is not columns of one projection")
    return Heads(source, start, stop, value_of(x).shape[-1], *angles, interleaved, norm, float(eps))


def _columns(x: Node) -> tuple[Node, int, int, int]:
    """The columns of a projection that a view [tokens, heads, size] is of."""
    return _piece(strip(x, PLAIN))


def _match(node: Node) -> Match | Refusal | None:
    key, value, *where = arguments_of(node).values()
    shape = value_of(key).shape
    if len(shape) != 3 or not all(isinstance(one, int) for one in (*shape[1:], *value_of(value).shape[1:])):
        return _near("keys are not [tokens, heads, size]")
    k = _heads(key, shape[0])
    if not isinstance(k, Heads):
        return k or Refusal("no rotation by halves or pairs of one row a token leads to the keys")
    if set(strip_users(key)) != {node}:
        return _near("the rotated keys are used elsewhere too")
    source, start, stop, step = _columns(value)
    width = value_of(k.source).shape[1]
    if source is not k.source or (start, stop, step) != (k.stop, width, 1):
        return _near("values are not the last columns of the keys' projection")
    if k.start % k.size or k.stop - k.start != shape[1] * k.size or k.start == 0:
        return _near("queries are not the first columns of the keys' projection")
    heads = k.start // k.size
    found = _queries(k, shape[0], heads)
    if not isinstance(found, tuple):
        return found or _near("no rotated queries of the keys' projection")
    query, q = found
    if (q.angles, q.positions, q.interleaved) != (k.angles, k.positions, k.interleaved):
        return _near("queries and keys are not turned alike")
    if q.norm is not None and k.norm is not None and q.eps != k.eps:
        return _near("the norms of queries and keys have different epsilons")
    at = query if query < node else node
    late = [
        one
        for one in (k.source, k.angles, k.positions, q.norm, k.norm, *where)
        if isinstance(one, Node) and not one < at
    ]
    if late:
        return _near(f"{late[0].name} is there only after the rotated queries")
    return Match(query, at, q, k, tuple(where))


def strip_users(node: Node) -> Iterator[Node]:
    """Users of a value, and of what is the same behind casts, views and copies."""
    while _is(node, *PLAIN):
        if len(node.users) > 1:
            break
        node = node.args[0]
    for user in node.users:
        yield from strip_users_of(user)


def strip_users_of(user: Node) -> Iterator[Node]:
    """The user, or those of a view of it."""
    if _is(user, *PLAIN):
        for one in user.users:
            yield from strip_users_of(one)
    else:
        yield user


def _queries(k: Heads, tokens: Any, heads: int) -> tuple[Node, Heads] | Refusal | None:
    """The first node, in graph order, that is the rotated queries in the projection's dtype."""
    reached, queue, refusal = {k.source}, deque([k.source]), None
    while queue:
        for user in queue.popleft().users:
            if user.op == "call_function" and user not in reached and isinstance(value_of(user), torch.Tensor):
                reached.add(user)
                queue.append(user)
    dtype = dtype_of(k.source)
    for node in sorted(reached - {k.source}):
        value = value_of(node)
        first, *inner = value.shape or (0,)
        whole = all(isinstance(size, int) for size in inner) and math.prod(inner) == heads * k.size
        if not whole or not inner or value.dtype != dtype or not same_size(first, tokens):
            continue
        found = _heads(node, tokens)
        if isinstance(found, Heads) and (found.source, found.start, found.stop) == (k.source, 0, k.start):
            return node, found
        refusal = refusal or (found if isinstance(found, Refusal) else None)
    return refusal


def _guard(match: Match) -> str | None:
    for name, node in (("the projection", match.k.source), ("the table of angles", match.k.angles)):
        if dtype_of(node) not in FLOATS:
            return f"{name} is {dtype_of(node)}, which no kernel takes"
    return None


def _note(node: Node, match: Match) -> str:
    parts = [f"norm of {name}" for name, heads in (("q", match.q), ("k", match.k)) if heads.norm is not None]
    if match.k.interleaved:
        parts.append("interleaved")
    rotary = value_of(match.k.angles).shape[1]
    return ", ".join([*parts, *([f"{rotary} of {match.k.size}"] if rotary < match.k.size else [])])


def _build(graph: Graph, node: Node, match: Match) -> Node:
    call, q, k = fakes.calling(graph), match.q, match.k
    made = call(known[node.target], k.source, k.angles, k.positions, q.norm, k.norm, k.start // k.size, k.size,
                k.interleaved, k.eps if k.norm is not None else q.eps, *match.where)  # fmt: skip
    query, token = (call(operator.getitem, made, i) for i in range(2))
    shape = value_of(match.query).shape[1:]
    if shape != value_of(query).shape[1:]:
        query = call(aten.reshape.default, query, [-1, *shape])
    fakes.replace(match.query, query)
    return token


RULES = (
    Rule(NAME, "attention", known, _match, _build, rope.eager, guard=_guard, note=_note, opt_in=True,
         place=lambda node, match: match.at),
)  # fmt: skip
