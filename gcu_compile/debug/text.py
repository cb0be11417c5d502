"""Graphs and generated code as text that two compilations of one model share line by line.

What differs from run to run is normalised: symbols are numbered by first appearance, cache paths and hashes are
named, files keep their last name only, and no address, id or time is written.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from gcu_compile.lowering.provenance import layer_of, source_line

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}
SYMBOL = re.compile(r"\b([su])(\d+)\b")
# /tmp/torchinductor_me/ab/cabcdef....h -> <cache>/file.h
CACHED = re.compile(r"(?:/[\w.+-]+)+/[a-z0-9]{2}/[a-z0-9]{30,}((?:\.\w+)+)")
REPLACED = (
    (CACHED, r"<cache>/file\1"),
    (re.compile(r"\b0x[0-9a-f]{6,}"), "0x"),
    (re.compile(r"# AOT ID: \[[^\]]*\]"), "# AOT ID: []"),
    (re.compile(r'(File:? "?)(?:/[\w.+-]+)+/'), r"\1"),
    (re.compile(r"kernel_hash='[0-9A-Fa-f]+'"), "kernel_hash=''"),
)


class Symbols:
    """Numbers the symbols of one graph by first appearance: `s77` -> `s0`."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def normalise(self, text: str) -> str:
        """`text` with this graph's symbols, and without what differs from run to run."""
        for pattern, replacement in REPLACED:
            text = pattern.sub(replacement, text)
        return SYMBOL.sub(self._rename, text)

    def _rename(self, match: re.Match) -> str:
        if match[0] not in self.names:
            kind = sum(name[0] == match[1] for name in self.names)
            self.names[match[0]] = f"{match[1]}{kind}"
        return self.names[match[0]]


def graph_lines(graph: torch.fx.Graph, symbols: Symbols) -> list[str]:
    """One line a node: `mul: f32[s0, 16] = aten.mul.Tensor(exp, 2)    # model.layers.0  model.py:7`."""
    return [symbols.normalise(_line(node)) for node in graph.nodes]


def _line(node: torch.fx.Node) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    head = f"{node.name}: {described(node.meta.get('val'))}"
    if node.op == "placeholder":
        return head
    target = node.target if isinstance(node.target, str) else _target(node.target)
    arguments = [_value(a) for a in node.args] + [f"{name}={_value(a)}" for name, a in node.kwargs.items()]
    call = target if node.op == "get_attr" else f"{target}({', '.join(arguments)})"
    place = "  ".join(filter(None, (layer_of(node), source_line(node))))
    return f"{head} = {call}" + (f"    # {place}" if place else "")


def described(value: Any) -> str:
    """`f32[2, s0]` of a tensor, `(f32[2], f32[2])` of several, the type's name of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(described, value))})"
    return str(value) if isinstance(value, torch.SymInt) else type(value).__name__


def _target(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    return getattr(function, "__name__", type(function).__name__)


def _value(value: Any) -> str:
    if isinstance(value, torch.fx.Node):
        return value.name
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(_value, value))
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(v)}" for name, v in value.items()) + "}"
    if isinstance(value, torch.fx.GraphModule):
        return "<graph>"
    return str(value).replace("torch.", "")
