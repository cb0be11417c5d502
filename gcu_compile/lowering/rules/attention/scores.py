"""From the input of a softmax down to the product of queries and keys.

    q, k -> bmm -> * scale -> cap * tanh(x / cap) -> + masks and biases -> softmax -> @ v

The walk goes from the softmax downwards, and looks through views, copies and casts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from gcu_compile.lowering.match import CASTS, Anything, Bind, Call, Found, Number, Through, find, number_of
from gcu_compile.lowering.rule import Refusal, same_shape, same_size, value_of
from gcu_compile.lowering.rules.attention.operands import Axes, stops, whole

aten = torch.ops.aten
MUL, DIV, ADD = (aten.mul.Tensor, aten.mul.Scalar), (aten.div.Tensor, aten.div.Scalar), aten.add.Tensor
WIDE = {torch.float32, torch.float64}
PRODUCTS = (aten.bmm.default, aten.mm.default, aten.baddbmm.default)

_DIM = Anything()
SOFTMAX = Call(
    DIV,
    Call(
        aten.exp.default,
        Call(aten.sub.Tensor, Bind("scores"), Call(aten.amax.default, Bind("scores"), _DIM, True, name="amax")),
        name="exp",
    ),
    Call(aten.sum.dim_IntList, Bind("exp"), _DIM, True, name="sum"),
) | Call(aten._softmax.default, Bind("scores"), _DIM, _DIM, name="softmax")
# What SDPA's math does since torch 2.5: a row that is all -inf gives 0 instead of NaN.
_SEEN = Call(aten.logical_not.default, Call(aten.eq.Scalar, Bind("scores"), -torch.inf))
SAFE_SOFTMAX = Call(
    aten.where.self,
    Call(aten.logical_not.default, Call(aten.any.dim, _SEEN, _DIM, True)),
    Number(value=0),
    SOFTMAX,
)
CAP = Call(
    MUL,
    Through(Call(aten.tanh.default, Through(Call(DIV, Bind("x"), Number("cap")) | Call(MUL, Bind("x"), Number("by"))))),
    Number("cap"),
)
# With dynamic=True a model's number is an input of the graph: a tensor of no dimensions, cast at each use.
RUN_TIME_CAP = Call(
    aten.mul.Tensor,
    Through(
        Call(aten.tanh.default, Through(Call(aten.div.Tensor, Bind("x"), Through(Bind("cap"), CASTS), name="inner")))
    ),
    Through(Bind("cap"), CASTS),
)


@dataclass
class Scores:
    """What lies between queries and weights.

    Attributes:
        q, k: the operands of their product, [..., queries, size] and [..., keys, size].
        added: tensors that are added, outermost first.
        keeps: bool tensors with the number that is put where they are False, or, with True, where they are True.
        shown: places on the way where batch and heads are apart.
        soft_cap: 0: none; a node: a tensor of no dimensions, known at run time only.
        factors: tensors of one element which multiply or divide the scores: (operation, tensor).
        safe: a query that sees no key gives 0 instead of NaN.
    """

    q: Axes | None = None
    k: Axes | None = None
    scale: float = 1.0
    soft_cap: float | Node = 0.0
    added: list[Axes] = field(default_factory=list)
    keeps: list[tuple[Axes, float, bool]] = field(default_factory=list)
    shown: list[Axes] = field(default_factory=list)
    factors: list[tuple[Any, Node]] = field(default_factory=list)
    safe: bool = False

    @property
    def scaled(self) -> bool:
        """Whether a factor or a cap was met, so that what lies below is inside of it."""
        return self.scale != 1 or bool(self.soft_cap) or bool(self.factors)


def softmax_of(node: Node) -> tuple[Node, bool, int] | Refusal | None:
    """(scores, whether rows of -inf give 0, dimension) of the softmax that `node` computes."""
    for pattern, safe in ((SAFE_SOFTMAX, True), (SOFTMAX, False)):
        found = find(pattern, node, near=3)
        if found is None or isinstance(found, Refusal):
            continue
        scores = found["scores"]
        rank = value_of(scores).dim()
        if "softmax" in found.bound:
            dims = [found["softmax"].args[1]]
        else:
            dims = [d for name in ("amax", "sum") for d in found[name].args[1]]
        if len({d % rank for d in dims}) != 1:
            return Refusal(f"the softmax reduces over dimensions {dims}")
        return scores, safe, dims[0] % rank
    return None


def read(axes: Axes) -> Scores | Refusal:
    """Read the scores downwards from the softmax's input.

    Args:
        axes: of that input; its columns are the softmax's dimension.
    """
    return _down(axes, Scores())


def _down(axes: Axes, so_far: Scores) -> Scores | Refusal:
    """One operation after the other, until the product."""
    refusal = _no_product(axes.node)
    for here in stops(axes):
        node = here.node
        if not same_size(here.repeat, 1):
            return Refusal("the scores are repeated over heads", near=True)
        if len(here.lead) > 1:
            so_far = replace(so_far, shown=[*so_far.shown, here])
        if node.op != "call_function":
            return _no_product(node)
        if node.target in CASTS:
            if not value_of(node.args[0]).dtype.is_floating_point:
                return _no_product(node)
            return _down(replace(here, node=node.args[0]), so_far)
        if node.target in PRODUCTS:
            return _product(here, so_far)
        step = STEPS.get(node.target)
        if step:
            return step(here, so_far)
        refusal = _no_product(node)
    return refusal


def _no_product(node: Node) -> Refusal:
    met = node.target if node.op == "call_function" else f"a {node.op}"
    return Refusal(f"the scores are no product of queries and keys: {node.name} is {met}", near=True)


def _product(here: Axes, so_far: Scores) -> Scores | Refusal:
    node, rank = here.node, value_of(here.node).dim()
    *bias, left, right = node.args[-3:] if node.target is aten.baddbmm.default else node.args
    rows, columns = (rank - 2 if here.rows is None else here.rows), (rank - 1 if here.columns is None else here.columns)
    if (rows, columns) != (rank - 2, rank - 1):
        return Refusal("the scores are transposed before the softmax")
    scores = so_far
    if bias:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if beta != 1 and beta != 0:
            return Refusal(f"the bias of the scores is scaled by {beta}")
        if beta and scores.scaled:
            return Refusal("the scores are scaled or capped after a bias was added")
        added = [whole(bias[0], rank)] if beta else []
        scores = replace(scores, scale=scores.scale * alpha, added=[*scores.added, *added])
    k = whole(right)
    return replace(scores, q=whole(left), k=replace(k, rows=k.columns, columns=k.rows))


def _continue(here: Axes, operand: Node, so_far: Scores) -> Scores | Refusal:
    if not isinstance(operand, Node) or not same_shape(value_of(operand), value_of(here.node)):
        return Refusal(f"the scores are broadcast at {here.node.name}", near=True)
    return _down(replace(here, node=operand), so_far)


def _scale(here: Axes, so_far: Scores) -> Scores | Refusal:
    node = here.node
    if capped := _cap(node):
        if so_far.scaled:
            return Refusal("the scores are scaled after the soft cap")
        scores, cap = capped
        return _continue(here, scores, replace(so_far, soft_cap=cap))
    left, right = node.args
    if number_of(left) is not None and node.target in MUL:
        left, right = right, left
    number = number_of(right)
    if number is None:
        return _scale_by_tensor(here, so_far)
    factor = 1 / number if node.target in DIV else number
    return _continue(here, left, replace(so_far, scale=so_far.scale * factor))


def _cap(node: Node) -> tuple[Node, float | Node] | None:
    """(scores, cap) of cap * tanh(scores / cap). tanh is odd: the sign of a cap has no effect."""
    found = find(CAP, node)
    if isinstance(found, Found):
        inner = found["cap"] if "by" not in found.bound else found["by"] and 1 / found["by"]
        same = found["cap"] != 0 and same_number(inner, found["cap"])
        return (found["x"], abs(float(found["cap"]))) if same else None
    found = find(RUN_TIME_CAP, node)
    if not isinstance(found, Found):
        return None
    cap, factors = found["cap"], (found["inner"].args[1], *node.args)
    # The op takes the number as it was before the casts, so that none of them may have rounded it.
    rounded = {value_of(factor).dtype for factor in factors if value_of(factor).dim() == 0} - WIDE
    single = value_of(cap).dim() == 0 and value_of(cap).dtype.is_floating_point
    return (found["x"], cap) if single and not rounded else None


def _scale_by_tensor(here: Axes, so_far: Scores) -> Scores | Refusal:
    """A factor that is known at run time only: the queries take it instead of the scores."""
    node = here.node
    for scores, factor in (node.args, node.args[::-1]):
        single = isinstance(factor, Node) and value_of(factor).dim() == 0
        if single and (node.target in MUL or factor is node.args[1]):
            target = aten.mul.Tensor if node.target in MUL else aten.div.Tensor
            return _continue(here, scores, replace(so_far, factors=[*so_far.factors, (target, factor)]))
    return Refusal(f"the scores are multiplied by a tensor at {node.name}", near=True)


def same_number(left: float, right: float) -> bool:
    """Equal up to the rounding of a reciprocal."""
    return abs(left - right) <= 1e-6 * abs(right)


def _add(here: Axes, so_far: Scores) -> Scores | Refusal:
    if here.node.kwargs.get("alpha", 1) != 1:
        return Refusal(f"{here.node.name} scales what it adds")
    if so_far.scaled:
        return Refusal("the scores are scaled or capped after a mask was added", near=True)
    refusals = []
    for scores, mask in (here.node.args[:2], here.node.args[1::-1]):
        if not isinstance(mask, Node) or not isinstance(scores, Node):
            continue
        found = _continue(here, scores, replace(so_far, added=[*so_far.added, broadcast(mask, here)]))
        if isinstance(found, Scores):
            return found
        refusals.append(found)
    return refusals[0] if refusals else Refusal(f"{here.node.name} adds a number to the scores")


def broadcast(mask: Node, scores: Axes) -> Axes:
    """The axes of a tensor that broadcasts to that of `scores`, whatever the order of its dimensions.

    One that is the same for all heads has (batch, no head), also where the scores have a dimension for groups.
    """
    rank, shape = value_of(scores.node).dim(), value_of(mask).shape

    def there(d: int | None) -> int | None:
        if d is None:
            return None
        own = d - (rank - len(shape))
        return None if own < 0 or same_size(shape[own], 1) else own

    batch, *heads = map(there, scores.lead)
    lead = (batch, None) if heads == [None, None] else (batch, *heads)
    return Axes(mask, lead, there(scores.rows), there(scores.columns))


def _where(here: Axes, so_far: Scores) -> Scores | Refusal:
    condition, then, other = here.node.args
    if so_far.soft_cap or so_far.factors:
        return Refusal("the scores are capped or scaled after they were masked")
    inverted = number_of(then) is not None
    scores, number = (other, number_of(then)) if inverted else (then, number_of(other))
    if number is None:
        return Refusal(f"{here.node.name} chooses between two tensors", near=True)
    if so_far.scale != 1 and number != -torch.inf:
        number = number * so_far.scale
    keep = (broadcast(condition, here), number, inverted)
    return _continue(here, scores, replace(so_far, keeps=[*so_far.keeps, keep]))


STEPS = {
    **dict.fromkeys((*MUL, *DIV), _scale),
    ADD: _add,
    aten.where.self: _where,
}
