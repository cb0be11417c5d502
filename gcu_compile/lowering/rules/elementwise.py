"""Norms, gated activations and rotary embeddings: recognised, reported, and left whole to Inductor, which fuses them.

    x * rsqrt(mean(x * x) + eps) * weight          rms_norm      (with the residual's add and the quantisation)
    (x - mean) * rsqrt(var + eps) * weight + bias  layer_norm
    silu(gate) * up, gelu(gate) * up               gated_activation
    x * cos + rotate_half(x) * sin                 rotary        (HF; vLLM's two halves; interleaved pairs)

These rules build nothing. What precedes and follows (`neighbours`) is told in the report: "after the residual's
add", "of a query or key head", "then quantised".
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from gcu_compile.lowering.match import CASTS, COPIES, VIEWS, Anything, Bind, Call, Found, Number, Through, find, strip
from gcu_compile.lowering.rule import Refusal, Rule, same_size, value_of

aten, prims = torch.ops.aten, torch.ops.prims
STEP = "elementwise"
LOOSE = CASTS | COPIES
MOVES = LOOSE | VIEWS | {aten.permute.default}
ADD, MUL, DIV = aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor
ADDS = (ADD, aten.add.Scalar)


EPS = Number("eps") | Bind("eps")  # a number, or a scalar that is known at run time only


def _loose(pattern) -> Through:
    return Through(pattern, LOOSE)


# After canonicalisation a square is x * x. The statistics are those of the same x, cast or not.
_MEAN = Call(aten.mean.dim, _loose(Call(MUL, Bind("x"), Bind("x"))), Anything(), True, name="mean")
RMS = Call(MUL, _loose(Bind("x")), _loose(Call(aten.rsqrt.default, Call(ADDS, _MEAN, EPS)))) | Call(
    DIV, _loose(Bind("x")), _loose(Call(aten.sqrt.default, Call(ADDS, _MEAN, EPS)))
)
_MOMENTS = Call(aten.var_mean.correction, Bind("x"), Anything(), name="moments")
_VAR = Call(operator.getitem, _MOMENTS, 0)
LAYER = Call(
    MUL,
    Call(aten.sub.Tensor, _loose(Bind("x")), Call(operator.getitem, _MOMENTS, 1)),
    Call(aten.rsqrt.default, Call(ADDS, _VAR, EPS)),
)


def _norm(pattern):
    def match(node: Node) -> Found | Refusal | None:
        found = find(pattern, node, near=4)
        if found is None or isinstance(found, Refusal):
            return found
        return over_last_dimension(found) or found

    return match


def over_last_dimension(norm: Found) -> Refusal | None:
    """Why the norm that was found is not one of each row, or None."""
    reduced = norm.get("mean") or norm["moments"]
    dims, rank = reduced.args[1], value_of(reduced.args[0]).dim()
    if [d % rank for d in dims] != [rank - 1]:
        return Refusal(f"the norm is over dimensions {list(dims)}, not the last one", near=True)
    return None


_E = Call(aten.exp.default, Call(aten.neg.default, Bind("gate")))
SILU = (
    Call(DIV, Bind("gate"), Call(ADD, _E, Number(value=1)))
    | Call(MUL, Bind("gate"), Call(aten.sigmoid.default, Bind("gate")))
    | Call(MUL, Bind("gate"), Call(DIV, Number(value=1), Call(ADD, _E, Number(value=1))))
    | Call(aten.silu.default, Bind("gate"))
)
_HALF = Call(MUL, Bind("gate"), Number(value=0.5))
_ERF = Call(ADD, Call(aten.erf.default, Call(MUL, Bind("gate"), Number(value=0.7071067811865476))), Number(value=1))
_CUBE = Call(MUL, Call(MUL, Bind("gate"), Bind("gate")), Bind("gate")) | Call(
    aten.pow.Tensor_Scalar, Bind("gate"), Number(value=3)
)
_INNER = Call(ADD, Bind("gate"), Call(MUL, _CUBE, Number(value=0.044715)))
_TANH = Call(
    ADD,
    Call(aten.tanh.default, Call(MUL, _INNER, Number(value=0.7978845608028654))),
    Number(value=1),
)
GELU = Call(MUL, _HALF, _ERF) | Call(MUL, _HALF, _TANH) | Call(aten.gelu.default, Bind("gate"))
RELU = Call(aten.relu.default, Bind("gate"))
GATED = Call(MUL, Through(SILU | GELU | RELU, MOVES), Bind("up"))


def _gated(node: Node) -> Found | Refusal | None:
    found = find(GATED, node, near=4)
    if not isinstance(found, Found):
        return found
    gate, up = value_of(found["gate"]), value_of(found["up"])
    if strip(found["up"], LOOSE) is strip(found["gate"], LOOSE):
        return None  # silu(x) spelled as x * sigmoid(x) in a wider product
    if gate.dim() != up.dim() or not all(map(same_size, gate.shape, up.shape)):
        return None  # scaled, not gated
    return found


def _slices(first: Any, second: Any) -> Node | None:
    """The tensor whose halves along the last dimension, or whose even and odd elements, these are."""
    nodes = [strip(one, MOVES) for one in (first, second)]
    if not all(isinstance(n, Node) and n.op == "call_function" for n in nodes):
        return None
    one, other = nodes
    if one.target is not other.target or one.target not in (aten.slice.Tensor, aten.select.int):
        return None
    x = one.args[0]
    if x is not other.args[0] or one.args[1] != other.args[1]:
        return None
    return x if one.args[2:] != other.args[2:] else None


# HF: x * cos + cat(-x2, x1) * sin
ROTATED = Call(
    ADD,
    Call(MUL, Bind("x"), Bind("cos")),
    Call(MUL, Call(aten.cat.default, Anything(), Anything(), name="cat"), Bind("sin")),
)
# vLLM and GPT-J: x1 * cos - x2 * sin and x2 * cos + x1 * sin, joined by cat or stack
TURNED = Call(
    aten.sub.Tensor, Call(MUL, Bind("one"), Bind("cos")), Call(MUL, Bind("two"), Bind("sin")), name="first"
)


def _rotary(node: Node) -> tuple[str, Node] | Refusal | None:
    """("half" or "pairs", x)"""
    if node.target is ADD:
        found = find(ROTATED, node, near=99)
        if not isinstance(found, Found):
            return None
        parts = found["cat"].args[0]
        if len(parts) != 2 or not isinstance(parts[0], Node) or parts[0].target is not aten.neg.default:
            return None
        x = _slices(parts[1], parts[0].args[0])
        if x is not strip(found["x"], LOOSE) and x is not found["x"]:
            return Refusal("what is rotated is not what is multiplied by the cosine", near=True)
        return "half", x
    parts = node.args[0]
    if len(parts) != 2:
        return None
    first = find(TURNED, strip(parts[0], MOVES), near=99)
    second = strip(parts[1], MOVES)
    if not isinstance(first, Found) or not isinstance(second, Node):
        return None
    other = Call(ADD, Call(MUL, Bind("two"), Bind("cos")), Call(MUL, Bind("one"), Bind("sin")))
    again = find(other, second, near=99)
    if not isinstance(again, Found) or any(again[name] is not first[name] for name in ("one", "two", "cos", "sin")):
        return Refusal("the second half is not turned by the same angle", near=True)
    x = _slices(first["one"], first["two"])
    return ("half", x) if x is not None else Refusal("the two parts are not of one tensor", near=True)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """What rule rms_norm recognises, without the weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """What rule layer_norm recognises, without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The commonest of what rule gated_activation recognises."""
    return F.silu(gate) * up


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What rule rotary recognises, as HF spells it."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


def neighbours(node: Node, found: Any) -> str:
    """What is fused with it: the residual's add before a norm, the quantisation after it."""
    notes = []
    x = found["x"] if isinstance(found, Found) and "x" in found.bound else None
    if x is not None:
        before = strip(x, LOOSE)
        shapes = isinstance(before, Node) and before.op == "call_function"
        if shapes and before.target is ADD and all(isinstance(arg, Node) for arg in before.args):
            notes.append("after the residual's add")
        if shapes and before.target in VIEWS | {aten.permute.default}:
            notes.append("of each head")
    if _quantised(node, 8):
        notes.append("then quantised")
    return ", ".join(notes)


def _quantised(node: Node, depth: int) -> bool:
    """Whether the value is rounded to an integer type a few elementwise operations later."""
    for user in node.users:
        if user.op != "call_function" or depth == 0:
            continue
        after = value_of(user)
        if user.target in CASTS and after.dtype in (torch.int8, torch.uint8):
            return True
        if user.target in ELEMENTWISE and _quantised(user, depth - 1):
            return True
    return False


ELEMENTWISE = LOOSE | VIEWS | {ADD, MUL, DIV, aten.round.default, aten.clamp_min.default, aten.clamp_max.default}
RULES = (
    Rule("rms_norm", STEP, (MUL, DIV), _norm(RMS), None, rms_norm, note=neighbours),
    Rule("layer_norm", STEP, (MUL,), _norm(LAYER), None, layer_norm, note=neighbours),
    Rule("gated_activation", STEP, (MUL,), _gated, None, gated, note=neighbours),
    Rule("rotary", STEP, (ADD, aten.cat.default), _rotary, None, rotary),
)
