"""Reports as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from gcu_compile.debug.explain import Explanation
    from gcu_compile.lowering.context import MatchRecord


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


def explanation(report: Explanation) -> Group:
    """Graphs, rules over layers, kernels, and what else there is to say."""
    from gcu_compile.options import Options

    graphs = _table("Graphs", "graphs", "for", "nodes before", "nodes after", "lowering ms")
    kinds: dict[tuple[str, str, str], list[float]] = {}
    for graph in report.graphs:
        first, last = (graph.steps[0], graph.steps[-1]) if graph.steps else (None, None)
        purpose = "inference" if graph.inference else "training: no rules"
        counts = (str(first.nodes_before) if first else "", str(last.nodes_after) if last else "")
        kinds.setdefault((purpose, *counts), []).append(1e3 * sum(step.seconds for step in graph.steps))
    for kind, milliseconds in kinds.items():
        graphs.add_row(str(len(milliseconds)), *kind, f"{sum(milliseconds):.1f}")
    kernels = _table("Kernels", "made by", "kernels", "calls", "most called")
    for by in ("hand-written", "inductor", "library"):
        found = sorted((k for k in report.kernels if k.by == by), key=lambda kernel: -kernel.calls)
        if found:
            most = ", ".join(f"{shortened(kernel.name)} x{kernel.calls}" for kernel in found[:3])
            kernels.add_row(by, str(len(found)), str(sum(kernel.calls for kernel in found)), most)
    rest = Table(show_header=False, box=None)
    for title, values in (
        ("graph break", report.graph_breaks),
        ("fallback", report.fallbacks),
        ("call", report.calls),
    ):
        for name, count in values.items():
            rest.add_row(title, name, f"x{count}")
    for (state, reason), count in Counter((graph["state"], graph["reason"]) for graph in report.cache).items():
        rest.add_row("cache", f"{state}: {reason}" if reason else state, f"x{count}")
    for name, value in report.options.items():
        if value != getattr(Options(), name):
            rest.add_row("option", name, str(value))
    if report.error is not None:
        rest.add_row("largest difference from eager", f"{report.error:.2e}")
    parts = [graphs, rules(report.matches)]
    return Group(*parts, *([kernels] if report.kernels else []), rest)


def rules(matches: list[MatchRecord]) -> Table:
    """Rule, status and reason, with the layers where it is so."""
    from gcu_compile.debug.explain import layer_root

    made = _table("Rules", "rule", "status", "places", "layers", "reason", "first at")
    groups: dict[tuple[str, str, str], list[MatchRecord]] = {}
    for match in matches:
        status = "left to Inductor" if match.status == "fused" and match.by == "inductor" else match.status
        groups.setdefault((match.rule, status, match.reason), []).append(match)
    for (rule, status, reason), found in sorted(groups.items()):
        layers = {root for match in found if (root := layer_root(match.layer))}
        first = found[0].source or found[0].node
        made.add_row(rule, status, str(len(found)), str(len(layers) or ""), reason, first)
    return made


def shortened(name: str, width: int = 48) -> str:
    """`cpp_fused_add_embedding...rsqrt_0`: the beginning and the end of a long name."""
    return name if len(name) <= width else f"{name[: width - 15]}...{name[-12:]}"
