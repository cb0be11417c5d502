"""The logits chain becomes `gcu::sample`.

    logits -> what is no chain (penalties, biases): stays      piece.py   where the chain begins
           -> masks, a widening cast                           piece.py   -> forbidden, the logits' own dtype
           -> temperature, top-k, top-p, min-p, softmax        fit.py     -> settings
           -> multinomial, argmax, or argmax of a race             noise.py

A chain is spelled in a hundred ways, so the rule does not look at the spelling: it runs the piece of the graph on probe
rows (`lowering/probe.py`) and compares the probabilities with those that `gcu::sample` means by settings built of the
piece's own numbers and per-row tensors. It tries the earliest place where the chain may begin first, then later ones.

Opt-in, because the result differs where plain torch leaves it to chance: `multinomial` draws another token from the
same distribution (torch's generator now gives the seed), and so does a race with exponential noise; equal logits at a
threshold are cut by id, a NaN counts as -inf, a row without a token gives id 0, a temperature of 0 is greedy where
plain torch divides by it, and tokens within float32's error of a threshold fall where float64 puts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from gcu_compile.kernels.sampling import eager
from gcu_compile.lowering import fakes
from gcu_compile.lowering.rule import Refusal, Rule, same_size, value_of
from gcu_compile.lowering.rules.post_processing import fit, noise, piece
from gcu_compile.torch_private import without_modes

aten, prims = torch.ops.aten, torch.ops.prims
MOST_CUTS = 6  # places that are probed: each costs a few runs of the piece


@dataclass
class Chain:
    """`root`'s value, and the places where its chain may begin. `cut` and `settings` are found by the guard."""

    root: Node
    greedy: bool
    cuts: list[piece.Cut]
    cut: piece.Cut | None = None
    settings: dict[str, fit.Setting] = field(default_factory=dict)


def _match(node: Node):
    """multinomial(chain(logits), 1), argmax(chain(logits), -1), or argmax(chain(logits) / exponential noise, -1)"""
    greedy = node.target is aten.argmax.default
    arguments = (
        dict(zip(("self", "dim" if greedy else "num_samples", "keepdim"), node.args, strict=False)) | node.kwargs
    )
    root = node.args[0]
    if len(getattr(value_of(root), "shape", ())) != 2:
        return None
    if greedy and arguments.get("dim") not in (-1, 1):
        return None
    logs = False
    if greedy and isinstance(race := noise.race_of(root), str):
        return Refusal(race, near=True)
    elif greedy and race:
        root, logs, greedy = race.root, race.logs, False
    nodes, inputs = piece.links_of(root)
    if not logs and not piece.is_chain(nodes):
        return None
    drawn = node.target is aten.multinomial.default
    if drawn and arguments["num_samples"] != 1:
        return Refusal(f"{arguments['num_samples']} samples a row; gcu::sample draws one", near=True)
    if drawn and arguments.get("generator") is not None:
        return Refusal("multinomial has a generator of its own", near=True)
    cuts = list(piece.cuts(root, nodes, inputs, logs))
    if cuts:
        return Chain(root, greedy, cuts)
    names = ", ".join(source.name for source in inputs)
    if len(inputs) == 1:
        return Refusal(f"{names} is no [rows, vocabulary] of logits, nor is anything computed from it", near=True)
    return Refusal(
        f"computed from {len(inputs)} values ({names}); from no [rows, vocabulary] on are they logits, numbers and one "
        "value a row alone",
        near=True,
    )


def _guard(chain: Chain) -> str | None:
    """Finds the settings by probing; the reason why no settings fit."""
    reasons = []
    with torch.no_grad(), without_modes():
        for cut in chain.cuts[:MOST_CUTS]:
            found = fit.find(cut, chain.greedy)
            if not isinstance(found, str):
                chain.cut, chain.settings = cut, found
                return None
            reasons.append(f"from {cut.logits.name} on: {found}")
    return reasons[0]


def _note(node: Node, chain: Chain) -> str:
    if chain.cut is chain.cuts[0]:
        return ""
    return f"from {chain.cut.logits.name} on; what makes it of {chain.cuts[0].logits.name} is left as it is"


def _build(graph: torch.fx.Graph, node: Node, chain: Chain) -> Node:
    call, bare = fakes.calling(graph), piece.bare(chain.cut.logits)
    logits, value = bare.logits, value_of(bare.logits)
    device = value.device
    rows, vocab = (
        size if isinstance(size, int) else call(aten.sym_size.int, logits, dim) for dim, size in enumerate(value.shape)
    )

    def per_row(name: str, setting: fit.Setting) -> Node:
        dtype = torch.int32 if name == "top_k" else torch.float32
        if not isinstance(setting, Node) or piece.is_number(setting):
            return call(aten.full.default, [rows], setting, dtype=dtype, device=device)
        if value_of(setting).dim() == 2:
            setting = call(aten.squeeze.dim, setting, 1)
        if value_of(setting).dtype != dtype:
            setting = call(prims.convert_element_type.default, setting, dtype)
        if value_of(setting).dim() == 1 and same_size(value_of(setting).shape[0], value.shape[0]):
            return setting
        return contiguous(call(aten.expand.default, setting, [rows]))

    def contiguous(tensor: Node) -> Node:
        return call(aten.clone.default, tensor, memory_format=torch.contiguous_format)

    settings = {name: per_row(name, setting) for name, setting in chain.settings.items()}
    masks = [*bare.forbidden, *(call(aten.logical_not.default, mask) for mask in bare.allowed)]
    if masks:
        mask = masks[0]
        for other in masks[1:]:
            mask = call(aten.logical_or.default, mask, other)
        settings["forbidden"] = contiguous(call(aten.expand.default, mask, [rows, vocab]))
    positions = call(aten.full.default, [rows], 0, dtype=torch.int64, device=device)
    seeds = positions
    if not chain.greedy:
        seeds = call(aten.randint.low, 0, 2**62, [rows], dtype=torch.int64, device=device)
    new = call(torch.ops.gcu.sample.default, logits, seeds, positions, **settings)
    keep = True
    if node.target is aten.argmax.default:
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return call(aten.unsqueeze.default, new, -1) if keep else new


RULES: tuple[Rule, ...] = (
    Rule(
        "sample_chain",
        "post_processing",
        (aten.multinomial.default, aten.argmax.default),
        _match,
        _build,
        eager.sample,
        guard=_guard,
        note=_note,
        opt_in=True,
    ),
)
