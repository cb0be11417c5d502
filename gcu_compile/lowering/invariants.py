"""What must hold of the graph after every step. A violation is a bug of ours; it names step and node.

INV-1  The graph is well formed: topological order, no dangling user, an output.
INV-2  A node that computes a tensor has a fake value in `meta["val"]`.
INV-3  A fused operation's fake equals the fake of its eager meaning: shape, dtype, device.
INV-4  The graph's outputs keep the metadata that they had before the step.
"""

from __future__ import annotations

import torch

from gcu_compile.errors import InvariantViolation
from gcu_compile.kernels import registry
from gcu_compile.lowering.rule import value_of


def signature(gm: torch.fx.GraphModule) -> list:
    """Metadata of the graph's outputs: (shape, dtype, device) of each tensor, None for the rest."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return [_metadata(value_of(node)) for node in output.all_input_nodes]


def _metadata(value):
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(map(str, value.shape)), value.dtype, value.device


def check(gm: torch.fx.GraphModule, step: str, before: list) -> None:
    """Raise `InvariantViolation` unless every invariant holds.

    Args:
        step: the step that just ran.
        before: `signature` of the graph before that step.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise InvariantViolation(f"[after {step}] INV-1: {error}") from error
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload) and "val" not in node.meta and node.users:
            raise InvariantViolation(f"[after {step}] INV-2: node {node.name} has no fake value")
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "gcu":
            _same_fake(node, step)
    after = signature(gm)
    if before != after:
        raise InvariantViolation(f"[after {step}] INV-4: outputs were {before}, are {after}")


def _same_fake(node: torch.fx.Node, step: str) -> None:
    op = registry.get(node.target._schema.name.split("::")[1])
    values = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
    if op is None or values is None:
        return
    args, kwargs = values
    modes = [v.fake_mode for v in args if isinstance(v, torch._subclasses.FakeTensor)]
    if not modes:
        return
    with modes[0]:
        meant, found = op.eager(*args, **kwargs), value_of(node)
    pairs = zip(meant, found, strict=True) if isinstance(meant, (tuple, list)) else [(meant, found)]
    for expected, actual in pairs:
        if _metadata(expected) != _metadata(actual):
            raise InvariantViolation(
                f"[after {step}] INV-3: node {node.name}: fake {_metadata(actual)}, meaning {_metadata(expected)}"
            )
