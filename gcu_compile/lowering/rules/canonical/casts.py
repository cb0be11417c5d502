"""Casts that do nothing. All exact."""

from __future__ import annotations

import torch
from torch.fx import Node

from gcu_compile.lowering.rule import Refusal, Rule, value_of
from gcu_compile.lowering.rules.canonical.common import fresh, identity, source

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


def _same_dtype(node: Node):
    """convert(x: bf16, bf16) -> x"""
    before, after = value_of(node.args[0]), value_of(node)
    if not isinstance(before, torch.Tensor) or before.dtype != after.dtype:
        return None
    return fresh(node, node.args[0])


def _round_trip(node: Node):
    """convert(convert(x: bf16, f32), bf16) -> x, where the middle dtype holds every value of the outer."""
    inner = node.args[0]
    if not isinstance(inner, Node) or inner.target is not prims.convert_element_type.default:
        return None
    outer = inner.args[0]
    before, middle, after = value_of(outer), value_of(inner), value_of(node)
    if before is None or before.dtype != after.dtype:
        return None
    if middle.dtype not in HOLDS.get(before.dtype, ()):
        return Refusal(f"{middle.dtype} does not hold every value of {before.dtype}", near=True)
    return fresh(node, outer)


CONVERT = (prims.convert_element_type.default,)
RULES = (
    Rule("noop_convert", "canonicalise", CONVERT, _same_dtype, source, identity),
    Rule("dtype_round_trip", "canonicalise", CONVERT, _round_trip, source, identity),
)
