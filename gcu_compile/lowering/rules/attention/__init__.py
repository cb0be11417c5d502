"""Attention: SDPA in all its spellings and decomposed attention become `gcu::attention`.

    _scaled_dot_product_*_attention(q, k, v, mask) -> [0]
    softmax(mask(cap(q @ k^T * scale))) @ v                 ->  gcu::attention(q, k, v, bias, ..., scale=, causal=, ...)

Repeated key and value heads are not repeated any more, masks that are known to be causal or a sliding window become
numbers, ALiBi becomes its slopes, and everything else that is added to the scores is the bias.

Where the model gives NaN (a query whose scores are all -inf, without SDPA's guard against it), so does the result.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from gcu_compile.kernels import attention
from gcu_compile.lowering import fakes
from gcu_compile.lowering.layout import arranged, size_of
from gcu_compile.lowering.match import CASTS, arguments_of, number_of, strip
from gcu_compile.lowering.positions import Positions
from gcu_compile.lowering.rule import Refusal, Rule, same_shape, same_size, value_of
from gcu_compile.lowering.rules.attention.masks import Inverted, Masks
from gcu_compile.lowering.rules.attention.operands import Attention, Axes, four, stops, unfolded, whole
from gcu_compile.lowering.rules.attention.scores import DIV, MUL, Scores, broadcast, read, softmax_of
from gcu_compile.lowering.rules.canonical import HOLDS

aten, prims = torch.ops.aten, torch.ops.prims
SDPA = tuple(
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    )
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _sdpa(node: Node) -> Attention | Refusal | None:
    """getitem(SDPA(q, k, v, mask), 0)"""
    call, index = node.args
    if not isinstance(call, Node) or call.target not in SDPA or index != 0:
        return None
    given = arguments_of(call)
    if any(user.args[1] != 0 and user.users for user in call.users):
        return Refusal("the log-sum-exp of the attention is used")
    if given.get("dropout_p"):
        return Refusal(f"dropout of {given['dropout_p']}")
    q, k, v = (whole(given[name]) for name in ("query", "key", "value"))
    scale = given.get("scale")
    if scale is None:
        size = value_of(given["query"]).shape[-1]
        if not isinstance(size, int):
            return Refusal("the head's size, which the scale is made of, is a symbol")
        scale = 1 / math.sqrt(size)
    scores = Scores(q, k, scale=scale, safe=True)
    mask = given.get("attn_mask", given.get("attn_bias"))
    if mask is not None:
        like = Axes(node, (0, 1), 2, 3)
        axes = broadcast(mask, like)
        boolean = value_of(mask).dtype == torch.bool
        scores = replace(scores, **({"keeps": [(axes, -torch.inf, False)]} if boolean else {"added": [axes]}))
    return _attention(scores, v, causal=bool(given.get("is_causal")))


def _decomposed(node: Node) -> Attention | Refusal | None:
    """bmm(softmax(scores), v)"""
    weights, values = node.args[:2]
    found = _softmax_behind(whole(weights))
    if found is None or isinstance(found, Refusal):
        return found
    axes, safe = found
    scores = read(axes)
    if isinstance(scores, Refusal):
        return scores
    return _attention(replace(scores, safe=safe), whole(values), out=value_of(node).dtype)


def _softmax_behind(axes: Axes) -> tuple[Axes, bool] | Refusal | None:
    """The axes of the input of the softmax that makes the weights, and whether it guards against rows of -inf."""
    for here in stops(axes):
        found = softmax_of(here.node)
        if isinstance(found, Refusal):
            return found
        if found is not None:
            scores, safe, dim = found
            if here.columns != dim and not (here.columns is None and same_size(value_of(scores).shape[dim], 1)):
                return None  # a softmax over something else than the keys
            return replace(here, node=scores), safe
        below = strip(here.node, CASTS)
        if below is not here.node:
            return _softmax_behind(replace(here, node=below))
    return None


def _attention(scores: Scores, v: Axes, causal: bool = False, out: torch.dtype | None = None) -> Attention | Refusal:
    (q, q_factor), (k, k_factor) = _unscaled(scores.q), _unscaled(scores.k)
    v = unfolded(v)
    narrow = out or value_of(v.node).dtype
    q, k, v = (_widened_from(one, narrow) for one in (q, k, v))
    found = Attention(q, k, v, scores.scale * q_factor * k_factor, scores.soft_cap, causal, factors=scores.factors)
    dtypes = sorted({str(value_of(one.node).dtype) for one in (q, k, v)} | {str(narrow)})
    if len(dtypes) != 1:
        return Refusal(f"queries, keys, values and the result have the dtypes {', '.join(dtypes)}", near=True)
    if narrow not in DTYPES:
        return Refusal(f"the dtype is {narrow}", near=True)
    if reason := found.settle(*scores.shown) or Masks(found, scores, Positions(), narrow).read():
        return Refusal(reason, near=True)
    if isinstance(found.offset, torch.SymInt) and not same_size(found.offset, _length(found.k) - _length(found.q)):
        return Refusal(f"the mask's offset is the symbol {found.offset}, not the keys that are ahead of the queries")
    return found


def _length(axes: Axes) -> Any:
    return axes.size(axes.rows)


def _unscaled(axes: Axes) -> tuple[Axes, float]:
    """An operand as early as it can be followed, and the number that it was multiplied by on the way."""
    for here in stops(axes):
        node = here.node
        if node.op != "call_function" or node.target not in MUL + DIV:
            continue
        number = number_of(node.args[1])
        if number is not None and same_shape(value_of(node.args[0]), value_of(node)):
            inner, factor = _unscaled(replace(here, node=node.args[0]))
            return inner, factor * (number if node.target in MUL else 1 / number)
    return unfolded(axes), 1.0


def _widened_from(axes: Axes, narrow: torch.dtype) -> Axes:
    """The operand before it was cast up from `narrow`: `gcu::attention` computes in float32 anyway."""
    node = axes.node
    if value_of(node).dtype == narrow or node.op != "call_function" or node.target not in CASTS:
        return axes
    before = value_of(node.args[0]).dtype
    if before != narrow or value_of(node).dtype not in HOLDS.get(narrow, ()):
        return axes
    return unfolded(replace(axes, node=node.args[0]))


def _build(graph: Graph, node: Node, found: Attention) -> Node:
    q, k, v = (four(graph, one, found.split) for one in (found.q, found.k, found.v))
    for target, factor in found.factors:
        q = graph.call_function(target, (q, factor))
    bias, slopes, offset = _bias(graph, found), None, found.offset
    if found.slopes:
        axes, factor = found.slopes
        slopes = arranged(graph, axes.node, axes.lead[1:] or axes.lead)
        if len(axes.lead) == 3:  # groups, and the heads of each
            slopes = graph.call_function(aten.reshape.default, (slopes, [axes.batch_and_heads()[1]]))
        slopes = slopes if factor == 1 else graph.call_function(aten.mul.Tensor, (slopes, factor))
    if isinstance(offset, torch.SymInt):
        ends = (size_of(graph, one.node, one.rows) if one.rows is not None else 1 for one in (found.k, found.q))
        offset = graph.call_function(operator.sub, tuple(ends))
    named = {"scale": found.scale, "causal": found.causal}
    if found.causal or found.window is not None:
        named["causal_offset"] = offset
    if found.window is not None:
        named["window"] = found.window
    if isinstance(found.soft_cap, Node):
        wide = torch.promote_types(value_of(found.q.node).dtype, torch.float32)
        cast = prims.convert_element_type.default
        named["soft_cap_tensor"] = graph.call_function(cast, (found.soft_cap, wide))
    elif found.soft_cap:
        named["soft_cap"] = found.soft_cap
    out = graph.call_function(torch.ops.gcu.attention.default, (q, k, v, bias, slopes), named)
    fakes.fill(_up_to(out, node))
    if found.restores_nan and bias is not None:
        sees = bias if value_of(bias).dtype == torch.bool else graph.call_function(aten.gt.Scalar, (bias, -math.inf))
        sees = graph.call_function(aten.any.dim, (sees, -1, True))
        nan = graph.call_function(aten.full.default, ([], math.nan), _made_like(value_of(out)))
        out = graph.call_function(aten.where.self, (sees, out, nan))
        fakes.fill(_up_to(out, node))
    if same_shape(value_of(out), value_of(node)):
        return out
    return graph.call_function(aten.reshape.default, (out, _shape(graph, out, value_of(node).shape)))


def _shape(graph: Graph, out: Node, wanted: Any) -> list[Any]:
    """`wanted` as an argument; symbols are read from `out`, which has the same rows and columns."""
    *lead, _, _ = wanted
    lead = [size if isinstance(size, int) else -1 for size in lead]
    return [*lead, *(size_of(graph, out, d) for d in (2, 3))]


def _up_to(last: Node, anchor: Node) -> list[Node]:
    """The nodes that were built before `anchor`, in order, up to `last`."""
    nodes, node = [], last
    while "val" not in node.meta and node.op == "call_function":
        nodes.append(node)
        node = node.prev
    return nodes[::-1]


def _made_like(value: torch.Tensor) -> dict[str, Any]:
    return {"dtype": value.dtype, "layout": torch.strided, "device": value.device, "pin_memory": False}


def _bias(graph: Graph, found: Attention) -> Node | None:
    """One tensor of all biases: bool keeps where True; with a float among them, it is -inf where they do not keep."""
    keep, added = None, None
    for axes in found.biases:
        node = four(graph, axes, found.split)
        if value_of(axes.node).dtype != torch.bool:
            added = node if added is None else graph.call_function(aten.add.Tensor, (added, node))
            continue
        if isinstance(axes, Inverted):
            node = graph.call_function(aten.logical_not.default, (node,))
        keep = node if keep is None else graph.call_function(aten.logical_and.default, (keep, node))
    if keep is None or added is None:
        return keep if added is None else added
    like = next(value_of(axes.node) for axes in found.biases if value_of(axes.node).dtype != torch.bool)
    low = graph.call_function(aten.full.default, ([], -math.inf), _made_like(like))
    return graph.call_function(aten.where.self, (keep, added, low))


RULES: tuple[Rule, ...] = (
    Rule(
        "attention",
        "attention",
        (operator.getitem, aten.bmm.default, aten.mm.default),
        lambda node: (_sdpa if node.target is operator.getitem else _decomposed)(node),
        _build,
        attention.ATTENTION.eager,
    ),
)
