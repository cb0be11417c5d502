"""Canonical forms: one spelling of each thing, so that one rule meets one form. All of these are exact."""

from __future__ import annotations

import torch

from gcu_compile.lowering.rule import Refusal, Rule, other_size, same_shape, same_size, value_of

aten = torch.ops.aten
prims = torch.ops.prims

# dtype -> those that hold all of its values.
HOLDS = {
    torch.bfloat16: {torch.float32, torch.float64},
    torch.float16: {torch.float32, torch.float64},
    torch.float32: {torch.float64},
    torch.int8: {torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64},
    torch.uint8: {torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64},
    torch.int32: {torch.int64, torch.float64},
}


def _source(graph, node, match):
    return match


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _same_view(node: torch.fx.Node):
    """view/expand to the shape that the input has:  view(x, x.shape) -> x"""
    source = node.args[0]
    before, after = value_of(source), value_of(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return Refusal("no shape is known")
    if not same_shape(before, after):
        return None
    return source


def _same_permute(node: torch.fx.Node):
    """permute(x, [0, 1, ...]) -> x"""
    dims = node.args[1]
    rank = len(dims)
    return node.args[0] if [d % rank for d in dims] == list(range(rank)) else None


def _whole_slice(node: torch.fx.Node):
    """slice(x, dim, 0, size) -> x"""
    source = node.args[0]
    dim, start, end, step = [*node.args[1:], *[None] * 4][:4]
    before, after = value_of(source), value_of(node)
    if step not in (None, 1) or start not in (None, 0):
        return None
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return Refusal("no shape is known")
    sizes = before.shape[dim or 0], after.shape[dim or 0]
    if other_size(*sizes):
        return None
    if not same_size(*sizes):
        return Refusal("the end is not known to reach the size", near=end is not None)
    return source


def _round_trip(node: torch.fx.Node):
    """convert(convert(x: bf16, f32), bf16) -> x, where the middle dtype holds every value of the outer."""
    inner = node.args[0]
    if not isinstance(inner, torch.fx.Node) or inner.target is not prims.convert_element_type.default:
        return None
    source = inner.args[0]
    before, middle, after = value_of(source), value_of(inner), value_of(node)
    if before is None or before.dtype != after.dtype:
        return None
    if middle.dtype not in HOLDS.get(before.dtype, ()):
        return Refusal(f"{middle.dtype} does not hold every value of {before.dtype}", near=True)
    return source


RULES = (
    Rule(
        "noop_view",
        "canonicalise",
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
        _same_view,
        _source,
        _identity,
    ),
    Rule("noop_permute", "canonicalise", (aten.permute.default,), _same_permute, _source, _identity),
    Rule("noop_slice", "canonicalise", (aten.slice.Tensor,), _whole_slice, _source, _identity),
    Rule(
        "dtype_round_trip",
        "canonicalise",
        (prims.convert_element_type.default,),
        _round_trip,
        _source,
        _identity,
    ),
)
