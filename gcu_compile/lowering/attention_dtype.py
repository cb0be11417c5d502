"""Attention that was widened for accuracy alone, in its own dtype again.

PyTorch decomposes SDPA on 16-bit tensors into float32 arithmetic: it casts queries, keys and values up, and the result
down. `gcu::attention` computes in float32 whatever its tensors are, so that the casts only double the bytes of the
cache. Where every operand was cast up from one dtype and every use of the result, behind views, casts down to it, the
operation takes the tensors as they were: the result is rounded once, as before.
"""

from __future__ import annotations

import torch
from torch.fx.node import Node, map_arg

from gcu_compile.lowering.rule import value_of

aten, prims = torch.ops.aten, torch.ops.prims
NARROW = (torch.bfloat16, torch.float16)
VIEWS = frozenset(
    [
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.clone.default,
    ]
)


def keep_dtype(gm: torch.fx.GraphModule) -> int:
    """Rewrite `gm` in place; returns how many attentions take narrower tensors now."""
    return sum(_narrow(gm.graph, node) for node in list(gm.graph.nodes) if _is_attention(node))


def _is_attention(node: Node) -> bool:
    return node.op == "call_function" and str(node.target) == "gcu.attention.default"


def _cast_to(node: Node) -> torch.dtype | None:
    """The dtype that a node casts to; None if it does anything else."""
    if node.op == "call_function" and node.target is prims.convert_element_type.default:
        return node.args[1]
    if node.op == "call_function" and node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
        return node.kwargs["dtype"]
    return None


def _narrow(graph: torch.fx.Graph, node: Node) -> bool:
    operands = list(node.args[:3])
    if value_of(node).dtype != torch.float32 or any(_cast_to(operand) is None for operand in operands):
        return False
    dtypes = {value_of(operand.args[0]).dtype for operand in operands}
    (dtype, *others) = dtypes
    if others or dtype not in NARROW:
        return False
    views, casts, todo = [], [], list(node.users)
    while todo:
        user = todo.pop()
        if user.op == "call_function" and user.target in VIEWS:
            views.append(user)
            todo += user.users
        elif _cast_to(user) == dtype:
            casts.append(user)
        else:
            return False
    node.args = (*(operand.args[0] for operand in operands), *node.args[3:])
    mode = value_of(node).fake_mode
    for changed in (node, *sorted(set(views), key=list(graph.nodes).index)):
        args, kwargs = map_arg((changed.args, dict(changed.kwargs)), value_of)
        with mode:
            changed.meta["val"] = changed.target(*args, **kwargs)
    for cast in casts:
        cast.replace_all_uses_with(cast.args[0])
        graph.erase_node(cast)
    return True
