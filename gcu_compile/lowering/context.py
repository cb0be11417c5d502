"""What a lowering run is given, and what it reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gcu_compile.options import Options

Observer = Callable[[str, torch.fx.GraphModule, str], None]


@dataclass
class StepRecord:
    """One step of the pipeline on one graph. `seconds` is wall time; the counters map an operation's
    name to how often it occurs."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    ops_before: dict[str, int]
    ops_after: dict[str, int]


@dataclass
class MatchRecord:
    """One place where a rule looked. `status`: fused (with what), skipped (the guard's reason), near_miss (what did
    not match), disabled (by the user). `index` counts the rule's anchors in the graph, from 0. `by`: who makes
    the code of a fused place, gcu (the graph was rewritten) or inductor (the chain was left whole for it). `graph`:
    the number of the compiled graph in this process, from 0."""

    rule: str
    index: int
    layer: str
    node: str
    status: str
    reason: str = ""
    source: str = ""
    by: str = "gcu"
    graph: int = 0

    @property
    def name(self) -> str:
        """What option `disable_matches` calls this place, in this graph alone."""
        return f"{self.rule}@{self.graph}.{self.index}"


@dataclass
class GraphReport:
    """What lowering did to one graph. `counts`: of steps that are no rules, what each did and how often."""

    target: str = ""
    inference: bool = True
    steps: list[StepRecord] = field(default_factory=list)
    matches: list[MatchRecord] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def fused(self) -> Counter[str]:
        """Rule -> places fused."""
        return Counter(match.rule for match in self.matches if match.status == "fused")

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries, for JSON."""
        return {**asdict(self), "fused": dict(self.fused)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> GraphReport:
        """The inverse of `to_json`."""
        return GraphReport(
            target=data["target"],
            inference=data["inference"],
            steps=[StepRecord(**step) for step in data["steps"]],
            matches=[MatchRecord(**match) for match in data["matches"]],
            counts=data.get("counts", {}),
        )


@dataclass
class Context:
    """Options and target of a run, its report, observers called before and after every step, the graph's number."""

    options: Options
    target: str
    report: GraphReport = field(default_factory=GraphReport)
    observers: list[Observer] = field(default_factory=list)
    graph: int = 0
