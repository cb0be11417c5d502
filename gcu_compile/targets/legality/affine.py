"""Strides of address arithmetic: by how many elements does an address move per step of each dimension?"""

from __future__ import annotations

from typing import Any

from gcu_compile.targets.ttir import Op, Value
from gcu_compile.targets.ttir_types import attribute

# A stride in elements: a number, or the text of what it is at run time.
Stride = int | str
STRIDE_OPS = frozenset(
    [
        "tt.expand_dims",
        "tt.broadcast",
        "tt.trans",
        "tt.addptr",
        "arith.addi",
        "arith.muli",
        "tt.bitcast",
        "arith.extsi",
        "arith.extui",
    ]
)


def uniform(value: Value) -> Stride | None:
    """The one value that all elements have: a number, the name of a run-time scalar, or None if they differ."""
    op = value.op
    if op is not None and op.name == "arith.constant":
        return constant(op)
    if not value.type.is_tensor:
        return value.name.lstrip("%")
    if op is None:
        return None
    if op.name in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi", "arith.extui", "arith.truncf"):
        return uniform(op.operands[0])
    if op.name in ("arith.addi", "arith.muli"):
        left, right = (uniform(operand) for operand in op.operands)
        if left is None or right is None:
            return None
        return _plus(left, right) if op.name == "arith.addi" else _times(left, right)
    return None


def constant(op: Op) -> Stride | None:
    """The number in an `arith.constant` (a splat's, for a tensor); text for a float; None for a list of values."""
    text = op.text[len("arith.constant") :].strip()
    text = text.rsplit(" : ", 1)[0].strip()
    if text.startswith("dense<"):
        text = text[len("dense<") : -1]
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text)
    except ValueError:
        return None if text.startswith("[") else text


def strides(value: Value, known: dict[Value, Any] | None = None) -> tuple[Stride, ...] | None:
    """Elements that the address moves per step of each dimension; None where that is not one stride.

    Args:
        value: a tensor of offsets or of pointers.
        known: answers of this walk so far, for a value that is used more than once.
    """
    known = {} if known is None else known
    if value not in known:
        known[value] = _strides(value, known)
    return known[value]


def _strides(value: Value, known: dict[Value, Any]) -> tuple[Stride, ...] | None:
    rank = len(value.type.shape)
    if uniform(value) is not None:
        return (0,) * rank
    op = value.op
    if op is None:
        loop = value.owner.parent if value.owner is not None else None
        return strides(loop.operands[2 + value.index], known) if loop and loop.name == "scf.for" else None
    if op.name == "tt.make_range":
        return (1,)
    if op.name == "tt.splat":
        return (0,) * rank
    if op.name not in STRIDE_OPS:
        return None
    parts = [strides(operand, known) for operand in op.operands]
    if any(part is None for part in parts):
        return None
    first = parts[0]
    if op.name == "tt.expand_dims":
        axis = int(attribute(op.text, "axis"))
        return (*first[:axis], 0, *first[axis:])
    if op.name == "tt.broadcast":
        sizes = op.operands[0].type.shape
        return tuple(0 if size == 1 else stride for size, stride in zip(sizes, first, strict=True))
    if op.name == "tt.trans":
        order = attribute(op.text, "order") or "1, 0"
        return tuple(first[int(axis)] for axis in order.split(":")[-1].strip("<> ").split(","))
    if op.name in ("tt.addptr", "arith.addi"):
        return tuple(_plus(a, b) for a, b in zip(*parts, strict=True))
    if op.name == "arith.muli":
        for moving, factor in ((parts[0], op.operands[1]), (parts[1], op.operands[0])):
            by = uniform(factor)
            if by is not None:
                return tuple(_times(stride, by) for stride in moving)
        return None
    return first


def _plus(left: Stride, right: Stride) -> Stride:
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    return right if left == 0 else left if right == 0 else f"{left}+{right}"


def _times(left: Stride, right: Stride) -> Stride:
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    if 0 in (left, right):
        return 0
    return right if left == 1 else left if right == 1 else f"{left}*{right}"
