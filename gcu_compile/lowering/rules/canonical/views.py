"""Views and copies that do nothing; one form of those that do. All exact."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from gcu_compile.lowering.rule import Refusal, Rule, other_size, same_shape, same_size, value_of
from gcu_compile.lowering.rules.canonical.common import fresh, identity, source

aten = torch.ops.aten
STEP = "canonicalise"
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


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


def _same_clone(node: Node):
    """clone(x) -> x, where the copy is laid out as x is"""
    copied = node.args[0]
    before, after = value_of(copied), value_of(node)
    if not isinstance(before, torch.Tensor) or not same_shape(before, after):
        return None
    if not all(map(same_size, before.stride(), after.stride())):
        return None  # it changes the order in memory
    return fresh(node, copied)


def _view_of_view(node: Node):
    """view(view(x, a), b) -> view(x, b)"""
    inner = node.args[0]
    if not isinstance(inner, Node) or inner.target not in RESHAPES:
        return None
    return inner.args[0]


def _build_view(graph: Graph, node: Node, found: Node) -> Node:
    return graph.call_function(node.target, (found, node.args[1]))


def _permute_of_permute(node: Node):
    """permute(permute(x, a), b) -> permute(x, a[b])"""
    inner = node.args[0]
    if not isinstance(inner, Node) or inner.target is not aten.permute.default:
        return None
    rank = len(node.args[1])
    return inner.args[0], [inner.args[1][d % rank] % rank for d in node.args[1]]


def _build_permute(graph: Graph, node: Node, found: tuple[Node, list[int]]) -> Node:
    return graph.call_function(aten.permute.default, found)


def _part(node: Node):
    """getitem(split(x, n, dim), i) -> slice(x, dim, i * n, i * n + n); chunk is a split by then"""
    pieces, index = node.args
    if not isinstance(pieces, Node) or pieces.target not in SPLITS or not isinstance(index, int):
        return None
    whole, sizes = pieces.args[:2]
    dim = pieces.args[2] if len(pieces.args) > 2 else pieces.kwargs.get("dim", 0)
    if isinstance(sizes, int):
        return whole, dim, index * sizes, (index + 1) * sizes
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(size, int) for size in sizes):
        return Refusal("the size of the parts is a symbol", near=True)
    return whole, dim, sum(sizes[:index]), sum(sizes[: index + 1])


def _build_slice(graph: Graph, node: Node, found: tuple[Node, int, int, int]) -> Node:
    return graph.call_function(aten.slice.Tensor, found)


def _again(node: Node):
    """a second f(x, ...) of the same view -> the first

    Nothing merges equal nodes of an inference graph before us: vLLM's split of q, k and v stands there once per use.
    """
    viewed = node.args[0]
    for other in viewed.users if isinstance(viewed, Node) else ():
        if other is node or other.target is not node.target or not other < node:
            continue
        if other.args == node.args and other.kwargs == node.kwargs:
            return fresh(node, other)
    return None


SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
REPEATED = (
    *RESHAPES,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
)
RULES = (
    Rule("split_to_slice", STEP, (operator.getitem,), _part, _build_slice, torch.narrow),
    Rule("repeated_view", STEP, REPEATED, _again, source, identity),
    Rule("noop_clone", STEP, (aten.clone.default,), _same_clone, source, identity),
    Rule("view_of_view", STEP, RESHAPES, _view_of_view, _build_view, torch.reshape),
    Rule("noop_view", STEP, (*RESHAPES, aten.expand.default), _same_view, source, identity),
    Rule("permute_of_permute", STEP, (aten.permute.default,), _permute_of_permute, _build_permute, torch.permute),
    Rule("noop_permute", STEP, (aten.permute.default,), _same_permute, source, identity),
    Rule("noop_slice", STEP, (aten.slice.Tensor,), _whole_slice, source, identity),
)
