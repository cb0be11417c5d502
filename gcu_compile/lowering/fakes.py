"""Fake values of new nodes, and of what they change: shapes stay, strides need not.

A fused operation may lay its result out in another order than the chain that it replaces. What follows is computed
anew until nothing changes any more; a `view` that the new strides do not allow becomes a `reshape`, and an output
of the graph keeps the strides that it had.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Collection, Iterable

import torch
from torch.fx import Node

from gcu_compile.lowering.rule import same_shape, value_of
from gcu_compile.torch_private import symbolic_dispatch

aten = torch.ops.aten


def compute(node: Node) -> None:
    """Set `node`'s fake value from those of its arguments."""
    mode = mode_of(node.graph)

    def value(argument: Node):
        if "val" not in argument.meta and argument.op == "get_attr":
            constant = getattr(argument.graph.owning_module, str(argument.target))
            return mode.from_tensor(constant) if mode else constant
        return argument.meta["val"]

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
    with mode or contextlib.nullcontext(), symbolic_dispatch(), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)


def calling(graph: torch.fx.Graph) -> Callable[..., Node]:
    """`call(target, *args, **kwargs)` inserts a call of `target` with its fake value."""

    def call(target, *args, **kwargs) -> Node:
        node = graph.call_function(target, args, kwargs)
        compute(node)
        return node

    return call


def mode_of(graph: torch.fx.Graph) -> torch._subclasses.FakeTensorMode | None:
    """The mode that a graph's fake values belong to."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), torch._subclasses.FakeTensor):
            return node.meta["val"].fake_mode
    return None


def fill(nodes: Iterable[Node]) -> None:
    """Fake values for those of `nodes`, in order, that have none."""
    for node in nodes:
        if node.op == "call_function" and "val" not in node.meta:
            _compute_or_reshape(node)


def replace(old: Node, new: Node, but: Collection[Node] = ()) -> None:
    """Let `new` take the place of `old` everywhere, except in the nodes of `but`, whatever its strides."""
    graph, before, after = old.graph, value_of(old), value_of(new)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in but)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or _same_strides(before, after):
        return
    order = {node: number for number, node in enumerate(graph.nodes)}
    queue, seen = [(order[user], user) for user in new.users], set(new.users)
    heapq.heapify(queue)
    if any(user.op == "output" for user in new.users):
        _keep_output(new, before)
    while queue:
        _, node = heapq.heappop(queue)
        if node.op != "call_function":
            continue
        was = value_of(node)
        _compute_or_reshape(node)
        now = value_of(node)
        if not isinstance(was, torch.Tensor) or _same_strides(was, now):
            continue
        if any(user.op == "output" for user in node.users):
            _keep_output(node, was)
        for user in node.users:
            if user in order and user not in seen:
                seen.add(user)
                heapq.heappush(queue, (order[user], user))


def _compute_or_reshape(node: Node) -> None:
    try:
        compute(node)
    except (RuntimeError, ValueError):
        if node.target is not aten.view.default:
            raise
        node.target = aten.reshape.default
        compute(node)


def _keep_output(node: Node, before: torch.Tensor) -> None:
    """Give the graph's output the strides that it had before."""
    (output,) = (user for user in node.users if user.op == "output")
    with node.graph.inserting_after(node):
        empty = node.graph.call_function(
            aten.new_empty_strided.default, (node, list(_constants(before.shape)), list(_constants(before.stride())))
        )
    if not all(isinstance(size, int) for size in (*empty.args[1], *empty.args[2])):
        node.graph.erase_node(empty)  # symbolic strides: contiguous is the one form that can be asked for
        with node.graph.inserting_after(node):
            copy = node.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    else:
        with node.graph.inserting_after(empty):
            copy = node.graph.call_function(aten.copy.default, (empty, node))
        compute(empty)
    compute(copy)
    output.replace_input_with(node, copy)


def _constants(sizes: Iterable) -> Iterable:
    return (size if isinstance(size, int) else size.node.maybe_as_int() or size for size in sizes)


def _same_strides(left: torch.Tensor, right: torch.Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return same_shape(left, right) and all(
        statically_known_true(a == b) or statically_known_true(size <= 1)
        for a, b, size in zip(left.stride(), right.stride(), left.shape, strict=True)
    )
