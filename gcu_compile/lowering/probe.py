"""What a piece of a graph computes, found out by running it.

Weights are unpacked in a hundred spellings: shifts of a broadcast word, masks and stacks, slices, two's complement
by comparison. Instead of a pattern for each, a rule cuts the piece out, runs it on values that it chose, and compares
the result with what it believes the piece to mean. On bit operations, affine arithmetic and data movement (`SAFE`) an
equality on random values of every input is as good as a proof: two different such functions differ nearly everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gcu_compile.lowering.rule import value_of
from gcu_compile.torch_private import without_modes

aten, prims = torch.ops.aten, torch.ops.prims

# Operations that only move elements; `index` and `slice` among them, with indices that are themselves safe.
MOVES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
    aten.clone.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten.index_select.default,
    aten.repeat.default,
}
CASTS = {prims.convert_element_type.default, aten._to_copy.default}
ARITHMETIC = {
    getattr(getattr(aten, name), overload)
    for name in (
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "bitwise_left_shift",
        "bitwise_right_shift",
        "__lshift__",
        "__rshift__",
        "__and__",
        "add",
        "sub",
        "mul",
        "neg",
        "where",
        "ge",
        "gt",
        "lt",
        "le",
        "remainder",
        "floor_divide",
    )
    for overload in getattr(aten, name).overloads()
    if not overload.endswith("out") and not overload.endswith("_")
}
MAKERS = {prims.iota.default, aten.full.default, aten.arange.default, aten.arange.start_step}
MAKERS |= {aten.scalar_tensor.default}
JOINS = {aten.cat.default, aten.stack.default}
SAFE = MOVES | CASTS | ARITHMETIC | MAKERS | JOINS | {aten.div.Tensor_mode}


class NotSafe(Exception):
    """A piece holds an operation of which a few values prove nothing; the message names it."""


def piece(root: torch.fx.Node, stop: Callable[[torch.fx.Node], bool] | None = None) -> list[torch.fx.Node]:
    """Nodes that `root` is computed from, in order, leaves included.

    A leaf is a graph input, a constant of the module, or a node that `stop` claims.

    Raises:
        NotSafe: an operation outside `SAFE` that is no leaf.
    """
    found: dict[torch.fx.Node, None] = {}

    def visit(node):
        if node in found:
            return
        if node.op not in ("placeholder", "get_attr") and not (stop and stop(node)):
            if node.target not in SAFE:
                raise NotSafe(f"{node.target}")
            for source in node.all_input_nodes:
                visit(source)
        found[node] = None

    visit(root)
    return list(found)


def leaves(nodes: list[torch.fx.Node]) -> Iterator[torch.fx.Node]:
    """Those of a piece that have no inputs inside it and are not made from nothing."""
    inside = set(nodes)
    for node in nodes:
        if node.target not in MAKERS and not (inside & set(node.all_input_nodes)):
            yield node


def run(root: torch.fx.Node, given: dict[torch.fx.Node, torch.Tensor], without_casts: bool = False) -> torch.Tensor:
    """The value of `root` where the nodes of `given` have these values. All sizes on the way are plain numbers, or
    nodes of `given`.

    Args:
        without_casts: leave every tensor in the dtype that it has, so that positions counted in float64 survive.

    Raises:
        KeyError: an input that has no value.
    """
    return run_all([root], given, without_casts)[0]


def run_all(
    roots: list[torch.fx.Node], given: dict[torch.fx.Node, torch.Tensor], without_casts: bool = False
) -> list[torch.Tensor]:
    """`run` for several nodes; each node on the way is computed once."""
    values = dict(given)

    def visit(node):
        if node in values:
            return values[node]
        if node.op == "get_attr":  # a constant of the module
            values[node] = getattr(node.graph.owning_module, node.target)
            return values[node]
        if node.op == "placeholder":
            raise KeyError(node.name)
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), visit)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        values[node] = args[0] if without_casts and node.target in CASTS else node.target(*args, **kwargs)
        return values[node]

    with torch.no_grad(), without_modes():
        return [visit(root) for root in roots]


def has_numbers_for_sizes(nodes: list[torch.fx.Node]) -> bool:
    """Whether no size in the piece is symbolic."""
    for node in nodes:
        value = value_of(node)
        if isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in value.shape):
            return False
    return True


def fingerprint(root: torch.fx.Node, nodes: list[torch.fx.Node]) -> str:
    """Equal for pieces that compute the same thing of inputs of the same shapes, whatever they are called."""
    number = {node: i for i, node in enumerate(nodes)}
    inside = set(nodes)
    lines = []
    for node in nodes:
        value = value_of(node)
        shape = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else ""
        leaf = not inside & set(node.all_input_nodes) and node.target not in MAKERS
        text = "leaf" if leaf else f"{node.target} {torch.fx.node.map_arg((node.args, node.kwargs), number.get)}"
        lines.append(f"{text} {shape}")
    return "\n".join([*lines, str(number[root])])
