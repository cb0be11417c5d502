"""A norm or a gated activation that is then quantised per token becomes one operation with its codes and scales.

    s = x + residual;  y = s * rsqrt(mean(s * s) + eps) * weight    y quantised -> gcu::rms_norm_quant: codes, scales, s
    y = silu(gate) * up                                             y quantised -> gcu::silu_mul_quant: codes, scales

    y quantised: scale = max|y| / 127;  codes = int8(clamp(round(y / scale)))    in float32; a scale of 0 may count as 1

Opt-in, because numbers change: the operations keep float32 from their inputs to the codes, where a model's own text
rounds to bfloat16 up to three times, so that a code may differ by one step. Left alone they are recognised by the rules
of `elementwise.py`, and Inductor makes one kernel of each.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from gcu_compile.kernels.prologues import eager
from gcu_compile.lowering import fakes
from gcu_compile.lowering.match import (
    CASTS,
    VIEWS,
    Anything,
    Bind,
    Call,
    Found,
    Number,
    Pattern,
    Through,
    arguments_of,
    find,
    strip,
)
from gcu_compile.lowering.rule import Refusal, Rule, same_shape, same_size, value_of
from gcu_compile.lowering.rules.elementwise import ADD, DIV, LOOSE, MOVES, MUL, RMS, SILU, over_last_dimension

aten, gcu = torch.ops.aten, torch.ops.gcu
PLAIN = LOOSE | VIEWS


def _plain(pattern: Pattern) -> Through:
    return Through(pattern, PLAIN)


_ABS = _plain(Call(aten.abs.default, _plain(Bind("y"))))
_MOST = Call(aten.amax.default, _ABS, Anything(), name="most") | Call(
    operator.getitem, Call(aten.max.dim, _ABS, Anything(), name="most"), 0
)
_SCALE = Call(DIV, _plain(_MOST), Number(value=127), name="scale") | Call(
    MUL, _plain(_MOST), Number(value=1 / 127), name="scale"
)
_NONE = Call(aten.eq.Scalar, _SCALE, Number(value=0))
_DIVISOR = Through(_SCALE | Call(aten.where.self, _NONE, Number(value=1), _SCALE), VIEWS)
_STEPS = Call(DIV, _plain(Bind("y")), _DIVISOR) | Call(MUL, _plain(Bind("y")), Call(aten.reciprocal.default, _DIVISOR))
_ROUNDED = _plain(Call(aten.round.default, _plain(_STEPS), name="rounded"))
# A zero point of 0, as `gcu::quantize_per_token`'s meaning adds it.
_WHOLE = _ROUNDED | Call(ADD, _ROUNDED, _plain(Call(aten.where.self, _NONE, Number(value=0), Number(value=0))))
_LOW, _HIGH = Number(value=-128) | Number(value=-127), Number(value=127)
_CLAMPED = (
    _WHOLE
    | Call(aten.clamp_max.default, Call(aten.clamp_min.default, _WHOLE, _LOW), _HIGH)
    | Call(aten.clamp_min.default, Call(aten.clamp_max.default, _WHOLE, _HIGH), _LOW)
    | Call(aten.clamp.default, _WHOLE, _LOW, _HIGH)
)
QUANTISED = Call(tuple(CASTS), _plain(_CLAMPED))
NORM = Call(MUL, Through(RMS, LOOSE), _plain(Bind("weight")))
GATE = Call(MUL, Through(SILU, MOVES), Through(Bind("up"), LOOSE))


@dataclass(frozen=True)
class Match:
    """Operands of the operation; `scale` and `total` (s) are nodes that it computes beside the codes."""

    inside: frozenset[Node]
    operands: tuple[Any, ...]
    scale: Node
    total: Node | None = None


def _near(reason: str) -> Refusal:
    return Refusal(reason, near=True)


def _quantised(node: Node, pattern: Pattern) -> tuple[Found, Found, frozenset[Node]] | Refusal | None:
    """(the quantisation, what `pattern` found of the value that is quantised, every node of both)."""
    value = value_of(node)
    if value.dtype != torch.int8 or not value_of(node.args[0]).is_floating_point():
        return None
    found = find(QUANTISED, node, near=5)
    if not isinstance(found, Found):
        return found
    source = strip(found["y"], PLAIN)
    inner = find(pattern, source, near=5) if isinstance(source, Node) else None
    if not isinstance(inner, Found):
        return inner
    between = {node, *_way(found["y"], source)}
    scale, row, reduced = value_of(found["scale"]), value_of(source), value_of(found["most"].args[0])
    dims = arguments_of(found["most"])["dim"]
    dims = [dim % reduced.dim() for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
    if dims != [reduced.dim() - 1] or not same_size(reduced.shape[-1], row.shape[-1]):
        return _near("the scale is not one of each token")
    if not isinstance(row.shape[-1], int):
        return _near("the size of a row is symbolic")
    if not scale.dtype == value_of(found["rounded"]).dtype == torch.float32:
        return _near(f"it is quantised in {scale.dtype}, not in torch.float32")
    if _shaped(value, row, -2) is None or _shaped(scale, row[..., :1], -1) is None:
        return _near("codes or scales are laid out in another way than rows")
    return found, inner, frozenset({*found.nodes, *inner.nodes, *between})


def _way(node: Node, source: Node) -> Iterator[Node]:
    """From `node` through casts and views to `source`, which is not of it."""
    while node is not source:
        yield node
        node = node.args[0]


def _shaped(value: torch.Tensor, like: torch.Tensor, extra: int) -> str | None:
    """How a tensor like `like` is brought to the shape of `value`: not at all, by a dimension of 1 more or less."""
    if same_shape(value, like):
        return "as it is"
    if same_shape(value, like.unsqueeze(extra)):
        return "unsqueeze"
    return "squeeze" if same_size(like.shape[-1], 1) and same_shape(value, like.squeeze(-1)) else None


def _used_outside(node: Node, inside: frozenset[Node], kept: tuple[Node | None, ...]) -> Refusal | None:
    """Why the nodes inside are needed although `node` is replaced, or not there in time; None if they are not."""
    for one in inside - {node}:
        for user in one.users:
            if user in inside or (one in kept and not user < node):
                continue
            if one in kept:
                return _near(f"{user.name} uses {one.name} before {node.name} is there")
            return _near(f"{one.name} is used elsewhere too, by {user.name}")
    return None


def _norm(node: Node) -> Match | Refusal | None:
    """int8(round(norm / scale))"""
    parts = _quantised(node, NORM)
    if not isinstance(parts, tuple):
        return parts
    quantised, norm, inside = parts
    if refusal := over_last_dimension(norm):
        return refusal
    total, weight, eps = strip(norm["x"], LOOSE), strip(norm["weight"], PLAIN), norm["eps"]
    value, scale = value_of(total), quantised["scale"]
    if isinstance(eps, Node):
        return _near("the norm's epsilon is no number")
    if value_of(weight).dim() != 1 or not same_size(value_of(weight).shape[0], value.shape[-1]):
        return _near("the norm's weight is not one of each value of a row")
    x, residual, kept = total, None, None
    if isinstance(total, Node) and total.target is ADD and all(isinstance(arg, Node) for arg in total.args):
        terms = [value_of(arg) for arg in total.args]
        if all(term.dtype == value.dtype and same_shape(term, value) for term in terms) and not total.kwargs:
            (x, residual), kept = total.args, total
            inside |= {total}
    inside |= set(_way(norm["x"], total))
    match = Match(inside, (x, residual, weight, float(eps)), scale, kept)
    return _used_outside(node, inside, (scale, kept)) or match


def _gate(node: Node) -> Match | Refusal | None:
    """int8(round(silu(gate) * up / scale))"""
    parts = _quantised(node, GATE)
    if not isinstance(parts, tuple):
        return parts
    quantised, gated, inside = parts
    gate, up = strip(gated["gate"], LOOSE), strip(gated["up"], LOOSE)
    product = value_of(gated.nodes[0])
    if not all(same_shape(value_of(one), product) for one in (gate, up)):
        return _near("gate and up are not of one shape")
    if value_of(gate).dtype != value_of(up).dtype:
        return _near(f"the gate is {value_of(gate).dtype}, what it lets through {value_of(up).dtype}")
    operands = (whole,) if (whole := _side_by_side(gate, up)) is not None else (gate, up)
    scale = quantised["scale"]
    inside = inside - {gate, up} | {*_way(gated["gate"], gate), *_way(gated["up"], up)}
    return _used_outside(node, inside, (scale,)) or Match(inside, operands, scale)


def _side_by_side(gate: Node, up: Node) -> Node | None:
    """The tensor whose halves along the last dimension these are."""
    if not gate.target is up.target is aten.slice.Tensor or gate.args[0] is not up.args[0]:
        return None
    x, size, last = gate.args[0], value_of(gate).shape[-1], value_of(gate).dim() - 1
    for half, (start, end) in ((gate, (0, size)), (up, (size, 2 * size))):
        if len(half.args) != 4 or half.args[1] % (last + 1) != last or half.args[2] != start or half.args[3] < end:
            return None
    return x if value_of(x).shape[-1] == 2 * size else None


def _guard(match: Match) -> str | None:
    value = value_of(match.operands[0])
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the input is {value.dtype}, which no kernel takes"
    return None


def _builder(operation: Any):
    def build(graph: Graph, node: Node, match: Match) -> Node:
        call = fakes.calling(graph)

        def shaped(new: Node, old: Node, extra: int) -> Node:
            way = _shaped(value_of(old), value_of(new), extra)
            if way == "as it is":
                return new
            return call(aten.squeeze.dim, new, -1) if way == "squeeze" else call(aten.unsqueeze.default, new, extra)

        made = call(operation, *match.operands)
        codes, scales = (call(operator.getitem, made, i) for i in range(2))
        fakes.replace(match.scale, shaped(scales, match.scale, -1), match.inside)
        if match.total is not None:
            fakes.replace(match.total, call(operator.getitem, made, 2), match.inside)
        return shaped(codes, node, -2)

    return build


RULES = (
    Rule("rms_norm_quant", "prologues", tuple(CASTS), _norm, _builder(gcu.rms_norm_quant.default),
         eager.rms_norm_quant, guard=_guard, opt_in=True),
    Rule("silu_mul_quant", "prologues", tuple(CASTS), _gate, _builder(gcu.silu_mul_quant.default),
         eager.silu_mul_quant, guard=_guard, opt_in=True),
)  # fmt: skip
