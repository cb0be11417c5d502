"""One spelling of the arithmetic that norms and linear layers are made of."""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from gcu_compile.lowering.match import (
    CASTS,
    Anything,
    Bind,
    Call,
    Found,
    Number,
    Through,
    arguments_of,
    find,
    number_of,
)
from gcu_compile.lowering.rule import Refusal, Rule, same_size, value_of
from gcu_compile.lowering.rules.canonical.common import fresh, identity, source

aten = torch.ops.aten
STEP = "canonicalise"
WIDE = (torch.float32, torch.float64)


def _square(node: Node):
    """pow(x, 2) -> x * x"""
    return node.args[0] if node.args[1] == 2 and value_of(node).dtype.is_floating_point else None


def _build_square(graph: Graph, node: Node, x: Node) -> Node:
    return graph.call_function(aten.mul.Tensor, (x, x))


def _times_one(node: Node):
    """mul(x, 1) -> x, where the dtype stays"""
    x, factor = node.args
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor != 1:
        return None
    if value_of(x).dtype != value_of(node).dtype:
        return Refusal(f"the product is {value_of(node).dtype}", near=True)
    return fresh(node, x)


ROOT = Call(aten.sqrt.default, Bind("x"))
RSQRT = (
    Call(aten.reciprocal.default, ROOT)
    | Call(aten.div.Tensor, Number(value=1), ROOT)
    | Call(aten.pow.Tensor_Scalar, ROOT, -1)
    | Call(aten.pow.Tensor_Scalar, Bind("x"), -0.5)
    | Call(aten.pow.Tensor_Scalar, Call(aten.pow.Tensor_Scalar, Bind("x"), 0.5), -1)
)


def _rsqrt(node: Node):
    """1 / sqrt(x), x ** -0.5 -> rsqrt(x)"""
    found = find(RSQRT, node)
    if found is None or isinstance(found, Refusal):
        return None
    if value_of(node).dtype not in WIDE:
        return Refusal(f"1 / sqrt(x) in {value_of(node).dtype} rounds the root too", near=True)
    return found["x"]


def _build_rsqrt(graph: Graph, node: Node, x: Node) -> Node:
    return graph.call_function(aten.rsqrt.default, (x,))


def _mean(node: Node):
    """sum(x, dims) / n -> mean(x, dims)"""
    total, count = node.args
    if not isinstance(total, Node) or total.target is not aten.sum.dim_IntList or len(total.users) > 1:
        return None
    given, x = arguments_of(total), value_of(total.args[0])
    number = number_of(count)
    sizes = [x.shape[d] for d in given["dim"] or ()]
    if number is None or not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if number != math.prod(sizes):
        return Refusal(f"the sum is over {math.prod(sizes)} values and divided by {number:g}", near=True)
    if x.dtype not in WIDE or value_of(total).dtype != x.dtype:
        return Refusal(f"a sum in {x.dtype} rounds before it is divided", near=True)
    return total.args[0], given["dim"], given["keepdim"]


def _build_mean(graph: Graph, node: Node, found: tuple) -> Node:
    return graph.call_function(aten.mean.dim, found)


VIEW = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
LINEAR = Call(
    aten.add.Tensor,
    Through(Call(aten.mm.default, Bind("x"), Bind("weight"), name="product", single_use=True), frozenset(VIEW)),
    Bind("bias"),
    name="sum",
)


def _bias_of_mm(node: Node):
    """mm(x, w) + bias -> addmm(bias, x, w), with or without a view between"""
    found = find(LINEAR, node, near=3)
    if found is None or isinstance(found, Refusal):
        return None
    product, bias, total = (value_of(found[name]) for name in ("product", "bias", "sum"))
    if node.kwargs.get("alpha", 1) != 1 or bias.dim() != 1:
        return None  # a residual, not a bias
    if not (same_size(bias.shape[0], product.shape[1]) and same_size(total.shape[-1], product.shape[1])):
        return Refusal(f"the bias has {bias.shape[0]} values for {product.shape[1]} columns", near=True)
    if not bias.dtype == product.dtype == total.dtype:
        return Refusal(f"the bias is {bias.dtype}, the product {product.dtype}", near=True)
    if any(len(one.users) > 1 for one in found.nodes[1:]):
        return Refusal("the product without the bias is used too", near=True)
    return found


def _build_addmm(graph: Graph, node: Node, found) -> Node:
    linear = graph.call_function(aten.addmm.default, (found["bias"], found["x"], found["weight"]))
    rank = value_of(node).dim()
    if rank == 2:
        return linear
    (view,) = (one for one in found.nodes if one.target in VIEW and value_of(one).dim() == rank)
    return graph.call_function(aten.view.default, (linear, view.args[1]))


def _signed_product(node: Node):
    """int_mm(uint8(codes + 128), w) - 128 * sum(w, 0) -> int_mm(codes, w), which is the same number

    torchao writes the former, because CPUs have an instruction for unsigned times signed bytes.
    """
    product, correction = node.args
    if not isinstance(product, Node) or product.target is not aten._int_mm.default or node.kwargs:
        return None
    shifted, weight = product.args
    codes = find(SHIFTED, shifted)
    if not isinstance(codes, Found) or value_of(shifted).dtype != torch.uint8:
        return None
    if value_of(codes["codes"]).dtype != torch.int8:
        return Refusal(f"the codes that 128 is added to are {value_of(codes['codes']).dtype}, not int8", near=True)
    total = find(COLUMN_SUM, correction) if isinstance(correction, Node) else None
    if not isinstance(total, Found) or total["weight"] is not weight:
        return Refusal("what is taken off is not 128 times the sum of the weight's columns", near=True)
    summed = next(one for one in total.nodes if one.target is aten.sum.dim_IntList)
    if list(arguments_of(summed)["dim"]) not in ([0], [-2]) or value_of(summed).dtype != torch.int32:
        return Refusal("the weight is not summed by column, in int32", near=True)
    if len(product.users) > 1:
        return Refusal("the product of the shifted codes is used too", near=True)
    return codes["codes"], weight


def _build_signed_product(graph: Graph, node: Node, found: tuple[Node, Node]) -> Node:
    return graph.call_function(aten._int_mm.default, found)


CAST = tuple(CASTS)
SHIFTED = Call(CAST, Call(aten.add.Tensor, Call(CAST, Bind("codes")), 128))
COLUMN_SUM = Call(aten.mul.Tensor, Call(aten.sum.dim_IntList, Bind("weight"), Anything(), Anything()), 128)

RULES = (
    Rule("signed_int_mm", STEP, (aten.sub.Tensor,), _signed_product, _build_signed_product, torch._int_mm),
    Rule("square", STEP, (aten.pow.Tensor_Scalar,), _square, _build_square, torch.square),
    Rule(
        "rsqrt",
        STEP,
        (aten.reciprocal.default, aten.div.Tensor, aten.pow.Tensor_Scalar),
        _rsqrt,
        _build_rsqrt,
        torch.rsqrt,
    ),
    Rule("times_one", STEP, (aten.mul.Tensor, aten.mul.Scalar), _times_one, source, identity),
    Rule("mean_of_sum", STEP, (aten.div.Tensor,), _mean, _build_mean, torch.mean),
    Rule("bias_of_mm", STEP, (aten.add.Tensor,), _bias_of_mm, _build_addmm, torch.addmm),
)
