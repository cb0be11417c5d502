"""A draw spelled as a race: the largest of p / e, or of log p - log e, with e from an exponential distribution.

Of independent exponential times e / p the first is token i with probability p_i, so that `argmax(p / e)` draws from p
as `multinomial` does (the exponential race; with logarithms, the Gumbel-max trick). Whether a piece of the graph makes
such noise is found out by running it on known uniform numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from gcu_compile.lowering import probe
from gcu_compile.lowering.rule import same_shape, value_of
from gcu_compile.lowering.rules.post_processing.piece import links_of
from gcu_compile.torch_private import without_modes

aten = torch.ops.aten
UNIFORM = {aten.rand.default, aten.rand_like.default}
# What is raced by an operation of two values -> whether these are logits, and the times of the second one's probe.
RACES = {
    aten.div.Tensor: (False, lambda e: e),
    aten.mul.Tensor: (False, lambda inverse: 1 / inverse),
    aten.sub.Tensor: (True, lambda log: log.exp()),
    aten.add.Tensor: (True, lambda gumbel: (-gumbel).exp()),
}
# Numbers that a probe puts in place of the uniform ones, in no order, so that noise that was sorted or joined over
# tokens or rows is none. At the ends a spelling may clamp, to stay finite.
_ORDER = torch.Generator().manual_seed(0)
PROBES = torch.stack([torch.linspace(0.002, 0.998, 997)[torch.randperm(997, generator=_ORDER)] for _ in range(2)])


@dataclass
class Race:
    """What is raced: `root`, the probabilities, or (`logs`) logits whose softmax they are."""

    root: Node
    logs: bool


def race_of(root: Node) -> Race | str | None:
    """The race whose winner the largest of `root` is; the reason why it is none although noise is in it; or None."""
    if root.op != "call_function" or root.target not in RACES or root.kwargs:
        return None
    logs, times = RACES[root.target]
    sides = [root.args[:2]] if root.target in (aten.div.Tensor, aten.sub.Tensor) else [root.args[:2], root.args[1::-1]]
    for under, noise in sides:
        uniform, nodes = _source(noise) if isinstance(noise, Node) and isinstance(under, Node) else (None, [])
        if uniform is not None:
            break
    else:
        return None
    if not same_shape(value_of(uniform), value_of(under)):
        return "the noise is not one number a token"
    inside = {*nodes, root}
    if any(user not in inside for node in (uniform, *nodes) for user in node.users):
        return "its noise is used elsewhere, too"
    try:
        with torch.no_grad(), without_modes():
            exponential = _is_exponential(times(probe.run(noise, {uniform: PROBES}).double()))
    except (KeyError, RuntimeError, IndexError, ValueError, TypeError) as error:
        return f"its noise cannot be run on probes: {error}"
    return Race(under, logs) if exponential else "its noise is not that of an exponential distribution"


def _source(noise: Node) -> tuple[Node | None, list[Node]]:
    """The one uniform number a token that `noise` is computed of, and the nodes on the way; None if it is another."""
    nodes, inputs = links_of(noise)
    tensors = [node for node in inputs if isinstance(value_of(node), torch.Tensor)]
    if len(tensors) == 1 and tensors[0].target in UNIFORM:
        return tensors[0], nodes
    return None, []


def _is_exponential(made: torch.Tensor) -> bool:
    """Whether `made` of PROBES is -log u or -log(1 - u), times a positive number a row: a factor changes no winner."""
    u = PROBES.double()
    if made.shape != u.shape or not bool((made > 0).all()):
        return False
    for expected in (-u.log(), -(-u).log1p()):
        factor = made / expected
        if torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-3):
            return True
    return False
