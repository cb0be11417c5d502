"""What became of a function: every place where a rule looked, graph breaks, fallbacks, kernels, effective options.

A graph that was found in the compile cache tells what the compilation that made its code told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gcu_compile import backend, recording, torch_private
from gcu_compile.generated import Kernel
from gcu_compile.kernels import registry
from gcu_compile.lowering.context import GraphReport, MatchRecord
from gcu_compile.options import resolve

SCHEMA = 1
LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclass
class Explanation:
    """What `explain` found.

    Attributes:
        graphs: one report per compiled graph, in the order of compilation.
        graph_breaks: Dynamo's reason -> occurrences.
        fallbacks: "operation: reason" -> calls that ran as plain torch.
        calls: "operation: implementation" -> calls of fused operations.
        options: the effective options, by name.
        error: largest absolute difference from eager over the outputs, or None without a tensor to compare.
        operations: operation -> occurrences in the lowered graphs.
        kernels: what the generated code calls, over all graphs, and who made it.
        cache: one of hit, miss, off for each Dynamo graph, with the reason.
        seconds: part of compilation -> wall time, over all graphs.
    """

    graphs: list[GraphReport]
    graph_breaks: dict[str, int]
    fallbacks: dict[str, int]
    calls: dict[str, int]
    options: dict[str, Any]
    error: float | None = None
    operations: dict[str, int] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    cache: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def matches(self) -> list[MatchRecord]:
        """Every place where a rule looked, over all graphs."""
        return [match for graph in self.graphs for match in graph.matches]

    @property
    def fused(self) -> Counter[str]:
        """Rule -> places fused, over all graphs."""
        return sum((graph.fused for graph in self.graphs), Counter())

    @property
    def layers(self) -> dict[str, dict[str, Counter[str]]]:
        """Rule -> layer (`model.layers.3`; empty outside of any) -> status -> places."""
        found: dict[str, dict[str, Counter[str]]] = {}
        for match in self.matches:
            found.setdefault(match.rule, {}).setdefault(layer_root(match.layer), Counter())[match.status] += 1
        return found

    def to_json(self) -> dict[str, Any]:
        """The attributes, `fused` and `layers` as plain values; see docs/json.md."""
        return {
            "schema": SCHEMA,
            **asdict(self),
            "graphs": [graph.to_json() for graph in self.graphs],
            "fused": dict(self.fused),
            "layers": {
                rule: {layer: dict(counts) for layer, counts in layers.items()} for rule, layers in self.layers.items()
            },
        }

    def __rich__(self):
        from gcu_compile.debug.tables import explanation

        return explanation(self)


def layer_root(path: str) -> str:
    """`model.layers.3` of `model.layers.3.self_attn`; empty for what stands in no numbered layer."""
    found = LAYER.match(path)
    return found[1] if found else ""


class Watch:
    """What this process's counters gain from here on; `explanation` tells it."""

    def __init__(self) -> None:
        self._graphs, self._recordings = len(backend.reports), len(backend.recordings)
        self._breaks = torch_private.graph_breaks()
        self._fallbacks, self._calls = Counter(registry.fallbacks), Counter(registry.calls)

    def explanation(self, options: Mapping[str, Any] | None, error: float | None = None) -> Explanation:
        """What was compiled and called since.

        Args:
            options: what the user asked for; the effective ones are told.
            error: largest difference from eager.
        """
        graphs, recordings = backend.reports[self._graphs :], backend.recordings[self._recordings :]
        operations: Counter[str] = Counter()
        for graph in graphs:
            if graph.steps:
                operations.update(graph.steps[-1].ops_after)
        kernels: Counter[tuple[str, str]] = Counter()
        for kernel in (kernel for one in recordings for graph in one.kernels for kernel in graph):
            kernels[kernel.name, kernel.by] += kernel.calls
        seconds: Counter[str] = Counter()
        # A hit has the seconds of the compilation that made its code; those count once.
        for one in {one.key or number: one for number, one in enumerate(recordings)}.values():
            seconds.update(one.seconds)
        return Explanation(
            graphs=graphs,
            graph_breaks=dict(torch_private.graph_breaks() - self._breaks),
            fallbacks={": ".join(key): count for key, count in (registry.fallbacks - self._fallbacks).items()},
            calls={": ".join(key): count for key, count in (registry.calls - self._calls).items()},
            options=asdict(resolve(options)),
            error=error,
            operations=dict(operations),
            kernels=[Kernel(name, by, calls) for (name, by), calls in kernels.items()],
            cache=[{"graph": one.name, "key": one.key, "state": one.state, "reason": one.reason} for one in recordings],
            seconds=dict(seconds),
        )


def explain(fn: Callable, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Compile `fn` for these arguments and tell what became of it.

    Runs `fn` twice, eager and compiled; arguments that it writes to are written twice.

    Args:
        options: as for `torch.compile(backend="gcu")`.
    """
    torch.compiler.reset()
    recording.restart_numbers()
    expected = fn(*args, **kwargs)
    watch = Watch()
    actual = torch.compile(fn, backend="gcu", options=dict(options or {}))(*args, **kwargs)
    return watch.explanation(options, _difference(actual, expected))


def _difference(actual: Any, expected: Any) -> float | None:
    pairs = [
        (a, b)
        for a, b in zip(_tensors(actual), _tensors(expected), strict=True)
        if a.numel() and not a.is_complex()
    ]
    return max(((a.double() - b.double()).abs().max().item() for a, b in pairs), default=None)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
