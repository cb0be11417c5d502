"""What is learned while one Dynamo graph is compiled, and kept so that a cache hit tells the same."""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import asdict
from typing import Any

import torch

from gcu_compile import torch_private
from gcu_compile.cache.key import cache_key, code_ingredients, graph_ingredients, key_of, layers_of, name_of
from gcu_compile.cache.store import Entry, Store
from gcu_compile.generated import Kernel, kernels
from gcu_compile.lowering.context import GraphReport, Observer
from gcu_compile.options import Options

_numbers = itertools.count()


def restart_numbers() -> None:
    """The next recorded graph is number 0 again."""
    global _numbers
    _numbers = itertools.count()


class Recording:
    """One compilation: begun before Inductor is asked, finished after.

    Attributes:
        number: of the graph among those compiled in this process; a graph found in a cache counts too.
        name: where the graph starts in the model's code.
        key: what it is kept under; empty when nothing is kept.
        state: `hit` (Inductor had the code), `miss` (it was compiled), `off` (caching is switched off, or
            Inductor is).
        reason: why it was no hit.
        reports: of the graphs lowered for it; of a hit, those of the compilation that made the code.
        kernels: the calls of each graph's code.
        seconds: part of the compilation -> wall time; of a hit, that of the compilation that made the code.
    """

    def __init__(self, gm: torch.fx.GraphModule, example_inputs: list[Any], options: Options, target: str):
        self.options, self.target, self.number = options, target, next(_numbers)
        self.name, self.key, self.state = name_of(gm), "", "off"
        self.reason = "switched off by option cache" if options.inductor else "nothing is generated without Inductor"
        self.reports: list[GraphReport] = []
        self.kernels: list[list[Kernel]] = []
        self.seconds: dict[str, float] = {}
        self._entry: Entry | None = None
        self._kept: Entry | None = None
        self._finished = False
        self._dump = None
        if options.dump:
            from gcu_compile.debug.dump import Recorder  # nothing of the dump runs when it is off

            self._dump = Recorder()
        if options.cache and options.inductor:
            ingredients: dict[str, Any] = {
                **code_ingredients(options, target),
                **graph_ingredients(gm, example_inputs),
                "dump": bool(options.dump),
            }
            if self._off:
                ingredients["disabled here"] = self._off
            self.key = key_of(ingredients)
            self._store = Store(options.effective_cache_dir())
            self._kept, self.reason = self._store.load(self.key)
            self._entry = Entry(self.key, ingredients, layers=layers_of(gm))
            if self._kept:
                self._entry.generation = self._kept.generation
        self._start, self._phases = time.perf_counter(), torch_private.phase_seconds()

    @property
    def uuid(self) -> str:
        """What stands for us in Inductor's key."""
        generation = self._entry.generation if self._entry else ""
        return "-".join([cache_key(self.options, self.target), str(generation), *self._off])

    @property
    def _off(self) -> list[str]:
        """Matches that are switched off in this graph alone: its code is not that of an equal one."""
        here = re.compile(rf".*@{self.number}\.\d+")
        return sorted(name for name in self.options.disable_matches if here.fullmatch(name))

    def bypassed(self, reason: str) -> None:
        """Code of this graph is not found again, whatever the entry here holds."""
        if self._entry:
            self._entry.bypass = reason

    def lowered(self, report: GraphReport) -> list[Observer]:
        """A graph is about to be lowered, and will tell of it in `report`; what shall watch the lowering."""
        self.reports.append(report)
        if self._dump is None:
            return []
        self._dump.begin(report)
        return [self._dump.step]

    def learned(self, generated: torch_private.Generated) -> None:
        """Inductor has made code, or found it."""
        self.kernels.append(kernels(generated.code))
        if self._dump:
            self._dump.code(generated)
        if self._finished:  # a backward graph, compiled at its first use
            self._save()
            if self._dump:
                self._dump.write(self, None)

    def finish(self) -> None:
        """The callable is there: find out whether it was a hit, and keep or take back what was learned."""
        hit = self._kept is not None and not self.reports
        if hit:
            self.state, self.reason = "hit", ""
            renamed = dict(zip(self._kept.layers, self._entry.layers, strict=True))
            self.reports = [GraphReport.from_json(report) for report in self._kept.reports]
            for match in (match for report in self.reports for match in report.matches):
                match.layer, match.graph = renamed.get(match.layer, match.layer), self.number
            self.kernels = [[Kernel(**kernel) for kernel in graph] for graph in self._kept.kernels]
            self.seconds = self._kept.seconds
        else:
            self.seconds = self._split()
            if self._entry:
                self.state = "miss"
                why = (self.reason, self._entry.bypass)
                self.reason = "; ".join(filter(None, why)) or "Inductor's own cache has no code for this key"
                self._save()
        self._finished = True
        if self._dump:
            self._dump.write(self, self._dump.renamed(self._kept.dump, renamed) if hit else None)
        self._kept = None
        if all(report.inference for report in self.reports):  # no backward graph will follow: let the texts go
            self._entry = self._dump = None

    def _save(self) -> None:
        if self._entry is None:
            return
        self._entry.reports = [report.to_json() for report in self.reports]
        self._entry.kernels = [[asdict(kernel) for kernel in graph] for graph in self.kernels]
        self._entry.seconds = self.seconds
        self._entry.dump = self._dump.graphs if self._dump else None
        self._store.save(self._entry)

    def _split(self) -> dict[str, float]:
        after = torch_private.phase_seconds()
        parts = {name: max(0.0, seconds - self._phases[name]) for name, seconds in after.items()}
        # Where vLLM calls our pass among its own, torch does not time it apart.
        untimed = max(0.0, sum(step.seconds for report in self.reports for step in report.steps) - parts["lowering"])
        parts["lowering"] += untimed
        parts["Inductor passes"] = max(0.0, parts["Inductor passes"] - untimed)
        total = time.perf_counter() - self._start
        return {**parts, "other": max(0.0, total - sum(parts.values())), "total": total}
