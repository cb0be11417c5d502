"""The logits chain becomes `gcu::sample`.

A chain is what stands between logits and `multinomial` or `argmax`: temperature, top-k, top-p, min-p and softmax, each
with a number. It is spelled in a hundred ways, so the rule does not look at the spelling: it runs the piece of the
graph on probe rows (`lowering/probe.py`) and compares the probabilities with those that `gcu::sample` means by settings
built of the piece's own numbers. Probe rows are peaked, geometric and nearly flat, distinct everywhere, and far from
a threshold: float32 sums of the chain and float64 ones must keep the same tokens.

Opt-in, because the result differs where plain torch leaves it to chance: `multinomial` draws another token from the
same distribution (torch's generator now gives the seed), equal logits at a threshold are cut by id, a NaN counts as
-inf, and tokens within float32's error of a threshold fall where float64 puts them.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from gcu_compile.kernels.sampling import eager
from gcu_compile.lowering import fakes, probe
from gcu_compile.lowering.rule import Refusal, Rule, value_of
from gcu_compile.torch_private import without_modes

aten = torch.ops.aten
# What a chain is made of beside moves and arithmetic.
LINKS = {
    getattr(getattr(aten, name), overload)
    for name in (
        *("topk", "sort", "cumsum", "kthvalue", "gather", "scatter", "slice_scatter", "select_scatter", "copy"),
        *(
            "exp",
            "log",
            "amax",
            "max",
            "sum",
            "_softmax",
            "_log_softmax",
            "softmax",
            "log_softmax",
            "div",
            "reciprocal",
        ),
        *("masked_fill", "logical_not", "logical_and", "logical_or", "bitwise_not", "maximum", "minimum", "clamp"),
        *("full_like", "zeros_like", "ones_like", "zeros", "empty", "logsumexp", "rsub", "lift_fresh_copy"),
    )
    for overload in getattr(aten, name).overloads()
    if not overload.endswith("out") and not overload.endswith("_")
} | {operator.getitem}
TELLING = ("topk", "sort", "cumsum", "exp", "softmax", "kthvalue")  # without one of these it is no chain
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1 << 23  # logits of a probe


@dataclass
class Chain:
    """`root`'s value, computed from `logits` alone. `settings` are found by the guard."""

    root: Node
    logits: Node
    nodes: list[Node]
    greedy: bool
    settings: dict[str, float] = field(default_factory=dict)


def _match(node: Node):
    """multinomial(chain(logits), 1) or argmax(chain(logits), -1)"""
    greedy = node.target is aten.argmax.default
    arguments = (
        dict(zip(("self", "dim" if greedy else "num_samples", "keepdim"), node.args, strict=False)) | node.kwargs
    )
    root, shape = node.args[0], getattr(value_of(node.args[0]), "shape", ())
    if len(shape) != 2:
        return None
    if greedy and arguments.get("dim") not in (-1, 1):
        return None
    nodes, inputs = _piece(root)
    if not any(word in str(link.target) for link in nodes for word in TELLING):
        return None
    if not greedy and arguments["num_samples"] != 1:
        return Refusal(f"{arguments['num_samples']} samples a row; gcu::sample draws one", near=True)
    if not greedy and arguments.get("generator") is not None:
        return Refusal("multinomial has a generator of its own", near=True)
    if not all(isinstance(size, int) for size in shape):
        return Refusal("the number of rows or the vocabulary is symbolic; probes need numbers", near=True)
    if len(inputs) != 1:
        names = ", ".join(source.name for source in inputs)
        return Refusal(f"computed from {len(inputs)} tensors ({names}), not from logits and numbers alone", near=True)
    logits = value_of(inputs[0])
    if not isinstance(logits, torch.Tensor) or logits.shape != shape or logits.dtype not in FLOATS:
        return Refusal(f"{inputs[0].name} is no [rows, vocabulary] of logits", near=True)
    return Chain(root, inputs[0], nodes, greedy)


def _piece(root: Node) -> tuple[list[Node], list[Node]]:
    """The links that `root` is computed by, and the values, constants aside, that they start from."""
    links: dict[Node, None] = {}
    inputs: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in links or node in inputs or node.op == "get_attr":
            return
        if node.op != "call_function" or node.target not in probe.SAFE | LINKS:
            inputs[node] = None
            return
        for source in node.all_input_nodes:
            visit(source)
        links[node] = None

    visit(root)
    return list(links), list(inputs)


def _guard(chain: Chain) -> str | None:
    """Finds the settings by probing; the reason why no settings fit."""
    rows, vocab = value_of(chain.logits).shape
    if rows * vocab > LARGEST or rows * vocab == 0:
        return f"{rows} x {vocab} logits are too many, or too few, to probe"
    with torch.no_grad(), without_modes():
        return _fit(chain, rows, vocab)


def _fit(chain: Chain, rows: int, vocab: int) -> str | None:
    probes = [_probe(kind, rows, vocab).to(value_of(chain.logits).dtype) for kind in range(4)]
    try:
        got = [probe.run(chain.root, {chain.logits: x}).float() for x in probes]
    except (KeyError, RuntimeError) as error:
        return f"the chain cannot be run on probes: {error}"
    for settings in _candidates(chain):
        pairs = list(zip(probes, got, strict=True))
        first = ((x[:1], y[:1]) for x, y in pairs)  # one row refutes most settings
        if all(_same(x, y, settings, chain.greedy) for x, y in itertools.chain(first, pairs)):
            chain.settings = settings
            return None
    return "the chain is not temperature, top-k, top-p and min-p by numbers of its own"


def _probe(kind: int, rows: int, vocab: int) -> torch.Tensor:
    """Distinct logits, of the row's own order: peaked, geometric, nearly flat at the top, or narrow."""
    generator = torch.Generator().manual_seed(kind)
    rank = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)]).double()
    if kind == 0:
        return (5 - 1.37 * rank).float()
    if kind == 1:
        return (3 - 0.0625 * rank.clamp(max=400) - 8 * (rank - 400).clamp(min=0)).float()
    if kind == 2:
        return (1 - 2.0**-7 * rank.clamp(max=120) - 8 * (rank - 120).clamp(min=0)).float()
    return (-0.5 * rank.clamp(max=60) - 8 * (rank - 60).clamp(min=0)).float()


def _candidates(chain: Chain):
    """Settings built of the numbers in the piece, the plainest first."""
    vocab = value_of(chain.logits).shape[1]
    scales: set[float] = set()
    shares: set[float] = set()
    ranks: set[int] = set()
    floors: set[float] = set()
    for node in chain.nodes:
        name = str(node.target).split(".")[1] if "." in str(node.target) else ""
        for value in node.args:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if name in ("div", "mul") and value > 0:
                scales |= {float(value), 1 / value}
                floors |= {float(value)} if name == "mul" and value < 1 else set()
            elif name in ("gt", "ge", "lt", "le"):
                shares |= {share for share in (float(value), 1 - value) if 0 < share < 1}
            elif name in ("topk", "kthvalue", "slice", "select") and isinstance(value, int):
                ranks |= {rank for rank in (value, -value, vocab - value, vocab - value + 1) if 0 < rank < vocab}
    lists = [sorted(scales - {1.0}), sorted(shares), sorted(ranks), sorted(floors)]
    choices = [[None, *values] for values in lists]
    combined = sorted(itertools.product(*choices), key=lambda some: sum(value is not None for value in some))
    for temperature, top_p, top_k, min_p in combined[:2048]:
        found = {"temperature": 1.0 if temperature is None else temperature, "top_p": top_p}
        found |= {"top_k": top_k, "min_p": min_p}
        yield {name: value for name, value in found.items() if value is not None}


def _settings(settings: dict[str, float], rows: int) -> dict[str, torch.Tensor]:
    dtype = {"top_k": torch.int32}
    return {name: torch.full((rows,), value, dtype=dtype.get(name, torch.float32)) for name, value in settings.items()}


def _same(x: torch.Tensor, got: torch.Tensor, settings: dict[str, float], greedy: bool) -> bool:
    """Whether `got` are the probabilities that the settings mean (greedy: largest at the same token)."""
    if greedy:
        return torch.equal(got.argmax(-1), x.float().argmax(-1))
    kept, weights = eager.kept_set(x.float(), **_settings(settings, len(x)))
    mass = torch.where(kept, weights, 0.0)
    expected = mass / mass.sum(-1, keepdim=True)
    if got.shape != expected.shape or not bool(((got > 0) == (expected > 1e-30))[expected > 1e-12].all()):
        return False
    return torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-9)


def _build(graph: torch.fx.Graph, node: Node, chain: Chain) -> Node:
    value = value_of(chain.logits)
    rows, device = value.shape[0], value.device

    def call(target, *args, **kwargs):
        new = graph.call_function(target, args, kwargs)
        fakes.compute(new)
        return new

    positions = call(aten.full.default, [rows], 0, dtype=torch.int64, device=device)
    if chain.greedy:
        new = call(torch.ops.gcu.sample.default, chain.logits, positions, positions)
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        return call(aten.unsqueeze.default, new, -1) if keep else new
    seeds = call(aten.randint.low, 0, 2**62, [rows], dtype=torch.int64, device=device)
    settings = {}
    for name, setting in chain.settings.items():
        dtype = torch.int32 if name == "top_k" else torch.float32
        settings[name] = call(aten.full.default, [rows], setting, dtype=dtype, device=device)
    return call(
        aten.unsqueeze.default, call(torch.ops.gcu.sample.default, chain.logits, seeds, positions, **settings), -1
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "sample_chain",
        "post_processing",
        (aten.multinomial.default, aten.argmax.default),
        _match,
        _build,
        eager.sample,
        guard=_guard,
        opt_in=True,
    ),
)
