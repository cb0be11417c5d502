"""Dequantise + matmul become `gcu::dequant_gemm`; an integer matmul + its scales become `gcu::int8_gemm`.

The weight is recognised by meaning, see `quantised_weight.py`. Weights may be graph inputs (parameters, as Dynamo
lifts them) or constants of the module; Inductor's freezing would fold the dequantised matrix into a constant before
this step sees it, and then there is nothing left to fuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gcu_compile.kernels.dequant_gemm import eager
from gcu_compile.lowering import fakes, probe
from gcu_compile.lowering.rule import Refusal, Rule, other_size, same_shape, same_size, value_of
from gcu_compile.lowering.rules.quantised_weight import Weight, placed, recover

aten, prims, gcu = torch.ops.aten, torch.ops.prims, torch.ops.gcu
HOLD_BYTES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Linear:
    """x @ weight + bias."""

    x: torch.fx.Node
    weight: Weight
    bias: torch.fx.Node | None


def _linear(node: torch.fx.Node):
    """mm(x, dequantised), addmm(bias, x, dequantised), and mul(mm(x, codes), scales)"""
    if node.target == aten.mul.Tensor:
        return _scaled_after(node)
    bias, x, matrix = (None, *node.args) if node.target == aten.mm.default else node.args
    if not isinstance(value_of(x), torch.Tensor) or not value_of(x).is_floating_point():
        return None
    weight = recover(matrix)
    if not isinstance(weight, Weight):
        return weight
    if bias is not None:
        if any(value != 1 for value in node.kwargs.values()):
            return Refusal("addmm with factors other than 1", near=True)
        if value_of(bias).dim() != 1 or other_size(value_of(bias).shape[0], value_of(matrix).shape[1]):
            return Refusal(f"the addend is {list(value_of(bias).shape)}, not a bias", near=True)
    return Linear(x, weight, bias)


@dataclass(frozen=True)
class ScaledAfter:
    """x @ weight in integers as floats, then scales of the outputs; `views`: between the two, innermost first."""

    x: torch.fx.Node
    weight: torch.fx.Node
    layout: str
    scales: torch.fx.Node
    views: tuple[torch.fx.Node, ...]


def _scaled_after(node: torch.fx.Node):
    """mul(mm(x, float(int8 weight)), scales), torchao's spelling of int8 weights"""
    for inner, scales in (node.args, node.args[::-1]) if len(node.args) == 2 else ():
        if not isinstance(inner, torch.fx.Node) or not isinstance(scales, torch.fx.Node):
            continue
        views, product = [], inner
        while product.target in RESHAPES:
            views.insert(0, product)
            product = product.args[0]
        if product.target != aten.mm.default or not value_of(product).is_floating_point():
            continue
        weight, layout = _stored_as_floats(product.args[1])
        if weight is None:
            continue
        n, given = value_of(product).shape[1], value_of(scales)
        if not given.is_floating_point():
            return Refusal(f"the product of integers is multiplied by {given.dtype}, which is no scale", near=True)
        if not same_size(value_of(inner).shape[-1], n) or not same_shape(value_of(inner), value_of(node)):
            return Refusal("the product of integers is scaled in another shape", near=True)
        leading = all(same_size(size, 1) for size in given.shape[:-1])
        if not leading or not (_single(scales) or same_size(given.shape[-1], n)):
            return Refusal(f"a factor of shape {list(given.shape)} is no scale of outputs", near=True)
        if any(len(one.users) > 1 for one in (product, *views)):
            return Refusal("the product of integers is used before it is scaled", near=True)
        if value_of(node).dtype != value_of(product).dtype:
            return Refusal(f"{value_of(product).dtype} is scaled to {value_of(node).dtype}", near=True)
        return ScaledAfter(product.args[0], weight, layout, scales, tuple(views))
    return None


def _stored_as_floats(matrix):
    """(node, layout) of an int8 weight that is multiplied as [K, N] in floating point, where it is the same numbers."""
    rows, cast = False, False
    while value_of(matrix).dtype != torch.int8 or _turns(matrix):
        if _turns(matrix):
            rows = not rows
        elif matrix.target in probe.CASTS and value_of(matrix).dtype in HOLD_BYTES:
            cast = True
        else:
            return None, ""
        matrix = matrix.args[0]
    return (matrix, "int8_rows" if rows else "int8_columns") if cast else (None, "")


def _turns(node: torch.fx.Node) -> bool:
    """Whether it swaps the two dimensions of a matrix, in any spelling."""
    if node.target == aten.t.default:
        return value_of(node).dim() == 2
    if node.target == aten.transpose.int:
        return value_of(node).dim() == 2 and (node.args[1] - node.args[2]) % 2 == 1
    return node.target == aten.permute.default and [dim % len(node.args[1]) for dim in node.args[1]] == [1, 0]


def _build_scaled_after(graph, node, match: ScaledAfter):
    call = fakes.calling(graph)
    scales = _of_outputs(match, value_of(node).shape[-1], call)
    made = call(gcu.dequant_gemm.default, match.x, match.weight, scales, None, None, None, layout=match.layout)
    for view in match.views:
        made = call(aten.view.default, made, view.args[1])
    return made


def _of_outputs(match: ScaledAfter | Integers, n, call) -> torch.fx.Node:
    """The scales of a match as [1, N]."""
    scales = match.scales
    if _single(scales):
        if not isinstance(n, int):
            n = call(aten.sym_size.int, match.weight, 0 if match.layout == "int8_rows" else 1)
        return call(aten.expand.default, call(aten.view.default, scales, [1, 1]), [1, n])
    while value_of(scales).dim() > 2:
        scales = call(aten.squeeze.dim, scales, 0)
    return call(aten.unsqueeze.default, scales, 0) if value_of(scales).dim() == 1 else scales


def _build_linear(graph, node, match: Linear | ScaledAfter):
    if isinstance(match, ScaledAfter):
        return _build_scaled_after(graph, node, match)
    call, weight, n = fakes.calling(graph), match.weight, value_of(node).shape[-1]
    scales = placed(weight.scales.source, weight.scales, n, 0, call)
    zeros = weight.zeros and placed(weight.zeros.source, weight.zeros, n, weight.zero_offset, call)
    if zeros is not None and value_of(zeros).shape[0] != value_of(scales).shape[0]:
        zeros = call(aten.expand.default, zeros, list(value_of(scales).shape))
    arguments = (match.x, weight.node, scales, zeros, weight.g_idx, match.bias)
    return call(gcu.dequant_gemm.default, *arguments, layout=weight.layout)


@dataclass(frozen=True)
class Integers:
    """x @ weight in integers, times scales."""

    x: torch.fx.Node
    weight: torch.fx.Node
    layout: str
    x_scales: torch.fx.Node | None
    scales: torch.fx.Node


def _int_product(node: torch.fx.Node):
    """mul(mul(float(int mm), x_scales), scales), scales in either order, casts in between"""
    if any(_is_taken(user) for user in _multiplied(node)):
        return None  # a larger product of the same sum is fused in its turn
    return _integers(node)


def _is_taken(node: torch.fx.Node) -> bool:
    """Whether this product, or a larger one of it, is fused."""
    return isinstance(_integers(node), Integers) or any(_is_taken(user) for user in _multiplied(node))


def _integers(node: torch.fx.Node):
    found = _product_under(node)
    if found is None:
        return None
    product, factors, casts = found
    x, matrix = product.args[:2]
    rows, n = value_of(product).shape
    # bfloat16 only rounds, once more than the operation.
    if wrong := [dtype for dtype in casts if dtype not in (torch.float32, torch.float64, torch.bfloat16)]:
        return Refusal(f"the integer sum goes through {wrong[0]}, which may not hold it", near=True)
    if not _bytes(x):
        return Refusal("the activations are not int8", near=True)
    weight, layout = _stored(matrix)
    if weight is None:
        return Refusal("the weight is not int8", near=True)
    per_row, per_output = None, None
    for factor in factors:
        shape = value_of(factor).shape
        if len(shape) == 2 and same_size(shape[0], rows) and same_size(shape[1], 1) and per_row is None:
            per_row = factor
    for factor in factors:
        shape = value_of(factor).shape
        if factor is per_row:
            continue
        leading = all(same_size(size, 1) for size in shape[:-1])
        if not leading or not (_single(factor) or same_size(shape[-1], n)):
            return Refusal(f"a factor of shape {list(shape)} is no scale of tokens or outputs", near=True)
        if per_output is None:
            per_output = factor
        elif per_row is None and (_single(factor) or _single(per_output)):
            # Two scales without rows: the one of a single value belongs to the activations.
            per_row, per_output = sorted((factor, per_output), key=_single, reverse=True)
        else:
            return Refusal("more than one scale per output", near=True)
    if per_output is None:
        return Refusal("there is no scale of the outputs", near=True)
    return Integers(x, weight, layout, per_row, per_output)


def _multiplied(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Products of the node's number, through casts."""
    for user in node.users:
        if user.target == aten.mul.Tensor:
            yield user
        elif user.target in probe.CASTS:
            yield from _multiplied(user)


def _single(node: torch.fx.Node) -> bool:
    """Whether it is known to hold one value."""
    return all(same_size(size, 1) for size in value_of(node).shape)


def _product_under(node):
    """(the integer mm, the factors, dtypes on the way) below a chain of products."""
    factors, casts = [], []
    while True:
        if node.target == aten.mul.Tensor and all(isinstance(arg, torch.fx.Node) for arg in node.args):
            inner = next((arg for arg in node.args if _above_int_mm(arg)), None)
            if inner is None:
                return None
            factors.append(node.args[1] if node.args[0] is inner else node.args[0])
            node = inner
        elif node.target in probe.CASTS:
            casts.append(value_of(node).dtype)
            node = node.args[0]
        else:
            return (node, factors, casts) if factors and _is_int_mm(node) else None


def _above_int_mm(node, depth: int = 8) -> bool:
    if _is_int_mm(node):
        return True
    if depth == 0 or (node.target not in probe.CASTS and node.target != aten.mul.Tensor):
        return False
    return any(isinstance(arg, torch.fx.Node) and _above_int_mm(arg, depth - 1) for arg in node.args[:2])


def _is_int_mm(node) -> bool:
    value = value_of(node)
    return node.target in (aten._int_mm.default, aten.mm.default) and value is not None and value.dtype == torch.int32


def _uncast(node):
    while node.target in probe.CASTS and value_of(node).dtype == torch.int32:
        node = node.args[0]
    return node


def _bytes(node) -> bool:
    return value_of(_uncast(node)).dtype == torch.int8


def _stored(matrix):
    """(node, layout) of an int8 weight that is multiplied as [K, N]."""
    source = _uncast(matrix)
    if value_of(source).dtype != torch.int8:
        return None, ""
    if _turns(source):
        inner = _uncast(source.args[0])
        if value_of(inner).dtype == torch.int8:
            return inner, "int8_rows"
    return source, "int8_columns"


def _build_integers(graph, node, match: Integers):
    call, x_scales = fakes.calling(graph), match.x_scales
    scales = _of_outputs(match, value_of(node).shape[-1], call)
    if x_scales is None:
        x_scales = call(aten.full.default, [1], 1.0, dtype=torch.float32, device=value_of(node).device)
    elif value_of(x_scales).dim() != 2 or not same_size(value_of(x_scales).shape[0], value_of(match.x).shape[0]):
        x_scales = call(aten.view.default, x_scales, [1])
    arguments = (_uncast(match.x), match.weight, scales, x_scales)
    return call(gcu.int8_gemm.default, *arguments, layout=match.layout, out_dtype=value_of(node).dtype)


RULES: tuple[Rule, ...] = (
    Rule(
        name="dequant_gemm",
        step="dequant_gemm",
        anchors=(aten.mm.default, aten.addmm.default, aten.mul.Tensor),
        match=_linear,
        build=_build_linear,
        eager=eager.dequant_gemm,
    ),
    Rule(
        name="int8_gemm",
        step="dequant_gemm",
        anchors=(aten.mul.Tensor,),
        match=_int_product,
        build=_build_integers,
        eager=eager.int8_gemm,
    ),
)
