"""What must hold of the graph after every step. A violation is a bug of ours; it names step, node and rule.

INV-1  The graph is well formed: topological order, no dangling user, an output.
INV-2  A node that computes a tensor has a fake value in `meta["val"]`.
INV-3  A fused operation's fake equals the fake of its eager meaning: shape, dtype, device.
INV-4  The graph's outputs keep the metadata that they had before the step.
INV-5  The graph stays functional: a node that a rule made writes into none of its arguments.
INV-6  The tensors that a fused operation gets are on one device; a scalar may stay on the CPU.
INV-7  After step legalise no 64-bit tensor is left for generated code.
INV-8  A node that a rule made has the module and the source line of what it replaced.
"""

from __future__ import annotations

import operator

import torch

from gcu_compile.errors import InvariantViolation
from gcu_compile.kernels import registry
from gcu_compile.lowering.legalise import FALLBACK
from gcu_compile.lowering.rule import value_of
from gcu_compile.torch_private import symbolic_dispatch

RULE = "gcu_rule"  # of a node that a rule made: a `MadeBy`


class MadeBy(str):
    """The name of the rule that made a node, and what was known of the node that it replaced."""

    replaced_writes: bool = False
    replaced_traced: bool = False

    @staticmethod
    def of(rule: str, replaced: torch.fx.Node) -> MadeBy:
        """For a node that `rule` puts in the place of `replaced`."""
        made = MadeBy(rule)
        made.replaced_writes, made.replaced_traced = writes(replaced), traced(replaced)
        return made


def writes(node: torch.fx.Node) -> bool:
    """Whether the operation writes into an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def traced(node: torch.fx.Node) -> bool:
    """Whether it is known where in the model the node comes from."""
    return bool(node.meta.get("nn_module_stack") or node.meta.get("stack_trace"))


def signature(gm: torch.fx.GraphModule) -> list:
    """Metadata of the graph's outputs: (shape, dtype, device) of each tensor, None for the rest."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    return [_metadata(value_of(node)) for node in output.all_input_nodes]


def _metadata(value):
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(map(str, value.shape)), value.dtype, value.device


def check(gm: torch.fx.GraphModule, step: str, before: list, meanings: dict | None = None) -> None:
    """Raise `InvariantViolation` unless every invariant holds.

    Args:
        step: the step that just ran.
        before: `signature` of the graph before that step.
        meanings: kept from step to step: what the meaning of a fused operation gives for arguments of one metadata.
            To ask it anew for each layer and step was more than half of the lowering's time.
    """
    meanings = {} if meanings is None else meanings
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise InvariantViolation(f"[after {step}] INV-1: {error}") from error
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload) and "val" not in node.meta and node.users:
            raise InvariantViolation(f"[after {step}] INV-2: {named(node)} has no fake value")
        if RULE in node.meta:
            _made_well(node, step)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "gcu":
            _same_fake(node, step, meanings)
        if step == "legalise":
            _fits_the_card(node, step)
    after = signature(gm)
    if before != after:
        raise InvariantViolation(f"[after {step}] INV-4: outputs were {before}, are {after}")


def _made_well(node: torch.fx.Node, step: str) -> None:
    if writes(node) and not node.meta[RULE].replaced_writes:
        raise InvariantViolation(f"[after {step}] INV-5: {named(node)} writes into its arguments")
    devices = {v.device for n in node.all_input_nodes if isinstance(v := value_of(n), torch.Tensor) and v.dim()}
    if getattr(node.target, "namespace", "") == "gcu" and len(devices) > 1:
        raise InvariantViolation(f"[after {step}] INV-6: {named(node)} gets tensors of {sorted(map(str, devices))}")
    if node.meta[RULE].replaced_traced and not traced(node):
        raise InvariantViolation(f"[after {step}] INV-8: {named(node)} has lost where it comes from")


def _fits_the_card(node: torch.fx.Node, step: str) -> None:
    wide = isinstance(v := value_of(node), torch.Tensor) and v.dtype in (torch.int64, torch.float64)
    if wide and not node.meta.get(FALLBACK) and node.target is not operator.getitem:
        raise InvariantViolation(f"[after {step}] INV-7: {named(node)} is {v.dtype} and not left to the vendor")


def named(node: torch.fx.Node) -> str:
    """The node, and the rule that made it."""
    rule = node.meta.get(RULE)
    return f"node {node.name}" + (f" (made by rule {rule})" if rule else "")


def _same_fake(node: torch.fx.Node, step: str, meanings: dict) -> None:
    op = registry.get(node.target._schema.name.split("::")[1])
    values = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
    if op is None or values is None:
        return
    args, kwargs = values
    modes = [v.fake_mode for v in args if isinstance(v, torch._subclasses.FakeTensor)]
    if not modes:
        return
    asked = repr((node.target, torch.fx.node.map_aggregate((args, kwargs), _described)))
    if asked not in meanings:
        with modes[0], symbolic_dispatch():
            meanings[asked] = _listed(op.eager(*args, **kwargs))
    for expected, actual in zip(meanings[asked], _listed(value_of(node)), strict=True):
        if expected != actual:
            raise InvariantViolation(f"[after {step}] INV-3: {named(node)}: fake {actual}, meaning {expected}")


def _listed(result) -> list:
    return [_metadata(value) for value in (result if isinstance(result, (tuple, list)) else [result])]


def _described(value):
    """What a meaning may depend on of an argument that has no values."""
    if isinstance(value, torch.Tensor):
        return *_metadata(value), tuple(map(str, value.stride())), value.requires_grad
    return str(value)
