"""What became of a function: every place where a rule looked, graph breaks, fallbacks, operations left.

The function is compiled anew, past every cache: a hit lowers nothing and so has nothing to tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from gcu_compile import backend, torch_private
from gcu_compile.kernels import registry
from gcu_compile.lowering.context import GraphReport, MatchRecord
from gcu_compile.options import resolve


@dataclass
class Explanation:
    """What `explain` found.

    Attributes:
        graphs: one report per compiled graph, in the order of compilation.
        graph_breaks: Dynamo's reason -> occurrences.
        fallbacks: "operation: reason" -> calls that ran as plain torch.
        calls: "operation: implementation" -> calls of fused operations.
        options: the effective options, by name.
        error: largest absolute difference from eager over the outputs, or None without a tensor.
        operations: operation -> occurrences in the lowered graphs.
    """

    graphs: list[GraphReport]
    graph_breaks: dict[str, int]
    fallbacks: dict[str, int]
    calls: dict[str, int]
    options: dict[str, Any]
    error: float | None = None
    operations: dict[str, int] = field(default_factory=dict)

    @property
    def matches(self) -> list[MatchRecord]:
        """Every place where a rule looked, over all graphs."""
        return [match for graph in self.graphs for match in graph.matches]

    @property
    def fused(self) -> Counter[str]:
        """Rule -> places fused, over all graphs."""
        return sum((graph.fused for graph in self.graphs), Counter())

    def to_json(self) -> dict[str, Any]:
        """Plain values; the keys are the attributes, and `fused`."""
        return {**asdict(self), "graphs": [graph.to_json() for graph in self.graphs], "fused": dict(self.fused)}

    def __rich__(self) -> Group:
        columns = ("graph", "for", "nodes before", "nodes after", "lowering ms")
        graphs = Table(*columns, title="Graphs", title_justify="left")
        for number, graph in enumerate(self.graphs):
            first, last = (graph.steps[0], graph.steps[-1]) if graph.steps else (None, None)
            graphs.add_row(
                str(number),
                "inference" if graph.inference else "training: no rules",
                str(first.nodes_before) if first else "",
                str(last.nodes_after) if last else "",
                f"{1e3 * sum(step.seconds for step in graph.steps):.1f}",
            )
        rules = Table("rule", "status", "places", "reason", "first at", title="Rules", title_justify="left")
        groups: dict[tuple[str, str, str], list[MatchRecord]] = {}
        for match in self.matches:
            groups.setdefault((match.rule, match.status, match.reason), []).append(match)
        for (rule, status, reason), found in sorted(groups.items()):
            rules.add_row(rule, status, str(len(found)), reason, found[0].source or found[0].node)
        rest = Table(show_header=False, box=None)
        for title, values in (
            ("graph break", self.graph_breaks),
            ("fallback", self.fallbacks),
            ("call", self.calls),
        ):
            for name, count in values.items():
                rest.add_row(title, name, f"x{count}")
        if self.error is not None:
            rest.add_row("largest difference from eager", f"{self.error:.2e}")
        return Group(graphs, rules, rest)


def explain(fn: Callable, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Compile `fn` for these arguments and tell what became of it.

    Runs `fn` twice, eager and compiled; arguments that it writes to are written twice.

    Args:
        options: as for `torch.compile(backend="gcu")`.
    """
    chosen = {**(options or {}), "cache": False}
    torch.compiler.reset()
    expected = fn(*args, **kwargs)
    before, breaks = len(backend.reports), torch_private.graph_breaks()
    fallbacks, calls = Counter(registry.fallbacks), Counter(registry.calls)
    actual = torch.compile(fn, backend="gcu", options=chosen)(*args, **kwargs)
    graphs = backend.reports[before:]
    operations: Counter[str] = Counter()
    for graph in graphs:
        if graph.steps:
            operations.update(graph.steps[-1].ops_after)
    return Explanation(
        graphs=graphs,
        graph_breaks=dict(torch_private.graph_breaks() - breaks),
        fallbacks={": ".join(key): count for key, count in (registry.fallbacks - fallbacks).items()},
        calls={": ".join(key): count for key, count in (registry.calls - calls).items()},
        options=asdict(resolve(chosen)),
        error=_difference(actual, expected),
        operations=dict(operations),
    )


def _difference(actual: Any, expected: Any) -> float | None:
    pairs = [
        (a, b)
        for a, b in zip(_tensors(actual), _tensors(expected), strict=True)
        if a.numel() and not a.is_complex()
    ]
    return max(((a.double() - b.double()).abs().max().item() for a, b in pairs), default=None)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
