"""The dump: an ordered folder of every compilation that two runs can be compared by, and a page to read it.

    <dump>/graph-000/00-input.txt ... 05-inductor.txt    the graph before and after every step
                     06-code.py                          what Inductor wrote
                     about.json kernels.json origins.json
                     timing.json                         the one file that differs between two dumps of a model
    <dump>/index.html                                    all of it, as one page without a server

`Recorder` collects while a graph is compiled; a cache hit writes what was collected when it was a miss. Several
processes may write into one folder: each graph takes the next free number.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gcu_compile.debug.text import Symbols, graph_lines
from gcu_compile.generated import calls
from gcu_compile.lowering.context import GraphReport
from gcu_compile.lowering.provenance import layer_of
from gcu_compile.torch_private import Generated, last_frame

if TYPE_CHECKING:
    from gcu_compile.recording import Recording

SCHEMA = 1
GRAPH_FOLDER = re.compile(r"graph-(\d{3,})")
# Options that say where things go; two dumps differ in them.
PLACES = ("dump", "cache_dir", "shadow_dir")


class Recorder:
    """Collects the text of each stage of the graphs of one compilation, as plain values that the cache can keep."""

    def __init__(self) -> None:
        self.graphs: list[dict[str, Any]] = []
        self._symbols, self._written = Symbols(), 0

    def begin(self, report: GraphReport) -> None:
        """A graph is about to be lowered."""
        self._symbols = Symbols()
        self.graphs.append({"stages": [], "code": [], "calls": [], "origins": {}})

    def step(self, step: str, gm: torch.fx.GraphModule, when: str) -> None:
        """An observer of the pipeline."""
        stages = self.graphs[-1]["stages"]
        if when == "after":
            self._stage(step, gm.graph)
        elif not stages:
            self._stage("input", gm.graph)

    def code(self, generated: Generated) -> None:
        """Inductor has written code for the graph begun last."""
        if not self.graphs:
            return  # Inductor had the code, and so nothing was lowered
        graph = self.graphs[-1]
        self._stage("inductor", generated.graph)
        text = self._symbols.normalise(generated.code)
        graph["code"] = text.splitlines()
        order = {name: place for place, name in enumerate(graph["origins"])}
        for call in calls(text, generated.provenance):
            nodes = sorted(call.pop("nodes"), key=lambda name: order.get(name, len(order)))
            graph["calls"].append({**call, "nodes": nodes})

    def write(self, recording: Recording, kept: list[dict[str, Any]] | None) -> None:
        """Write the graphs that are not written yet, and the page anew.

        Args:
            kept: of a cache hit, what was collected by the compilation that made its code.
        """
        from gcu_compile.debug import page

        if kept is not None:
            self.graphs = kept
        folder = Path(recording.options.dump)
        for number, graph in list(enumerate(self.graphs))[self._written :]:
            report = recording.reports[number] if number < len(recording.reports) else GraphReport()
            kernels = recording.kernels[number] if number < len(recording.kernels) else []
            _write_graph(_next(folder), recording, report, [asdict(kernel) for kernel in kernels], graph)
        self._written = len(self.graphs)
        page.write(folder)

    @staticmethod
    def renamed(graphs: list[dict[str, Any]], layers: dict[str, str]) -> list[dict[str, Any]]:
        """`graphs` with the layers of another graph of the same kind."""
        if all(old == new for old, new in layers.items()):
            return graphs
        for graph in graphs:
            for origin in graph["origins"].values():
                origin["layer"] = layers.get(origin["layer"], origin["layer"])
            for stage in graph["stages"]:
                stage["lines"] = stage["lines"] and [_relayered(line, layers) for line in stage["lines"]]
        return graphs

    def _stage(self, name: str, graph: torch.fx.Graph) -> None:
        """Lines are left out (None) where a stage changed nothing."""
        stages, origins = self.graphs[-1]["stages"], self.graphs[-1]["origins"]
        lines = graph_lines(graph, self._symbols)
        before = next((stage["lines"] for stage in reversed(stages) if stage["lines"] is not None), None)
        stages.append({"name": name, "lines": None if lines == before else lines})
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                file, line, source = last_frame(node.meta.get("stack_trace") or "")
                place = f"{file}:{line}" if file else ""
                origins.setdefault(node.name, {"layer": layer_of(node), "source": place, "line": source})


def _relayered(line: str, layers: dict[str, str]) -> str:
    head, mark, place = line.rpartition("    # ")
    layer, gap, source = place.partition("  ")
    return f"{head}{mark}{layers.get(layer, layer)}{gap}{source}" if mark else line


def _next(folder: Path) -> Path:
    """Make the folder of the next free number; two processes never get the same."""
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(m[1]) + 1 for f in folder.iterdir() if (m := GRAPH_FOLDER.fullmatch(f.name))), default=0)
    while True:
        try:
            made = folder / f"graph-{number:03}"
            made.mkdir()
            return made
        except FileExistsError:
            number += 1


def _write_graph(
    folder: Path, recording: Recording, report: GraphReport, kernels: list[dict[str, Any]], graph: dict[str, Any]
) -> None:
    options = {name: value for name, value in asdict(recording.options).items() if name not in PLACES}
    steps = {step.name: step for step in report.steps}
    stages, lines = [], []
    for number, stage in enumerate(graph["stages"]):
        lines = lines if stage["lines"] is None else stage["lines"]
        (folder / f"{number:02}-{stage['name']}.txt").write_text("\n".join(lines) + "\n")
        record = steps.get(stage["name"])
        stages.append({"name": stage["name"], "ops": record.ops_after if record else {}})
    if report.steps and stages:
        stages[0]["ops"] = report.steps[0].ops_before
    if graph["code"]:
        (folder / f"{len(stages):02}-code.py").write_text("\n".join(graph["code"]) + "\n")
    about = {
        "schema": SCHEMA,
        "name": recording.name,
        "target": report.target,
        "inference": report.inference,
        "options": options,
        "stages": stages,
        "matches": [asdict(match) for match in report.matches],
    }
    for name, value in (("about", about), ("kernels", {"kernels": kernels, "calls": graph["calls"]})):
        _json(folder / f"{name}.json", value)
    _json(folder / "origins.json", graph["origins"])
    lowering = {step.name: step.seconds for step in report.steps}
    _json(folder / "timing.json", {"parts": recording.seconds, "steps": lowering})


def _json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, default=str) + "\n")


def clear(folder: Path) -> None:
    """Remove an older dump from `folder`; files that are not a dump's stay."""
    for graph in folder.glob("graph-*"):
        if GRAPH_FOLDER.fullmatch(graph.name) and (graph / "about.json").is_file():
            for file in graph.iterdir():
                file.unlink()
            os.rmdir(graph)
    (folder / "index.html").unlink(missing_ok=True)


def dump(fn: Callable, *args: Any, directory: Path, options: Mapping[str, Any] | None = None) -> None:
    """Compile `fn` for these arguments, run it once, and write the dump into `directory`.

    Args:
        options: as for `torch.compile(backend="gcu")`.
    """
    torch.compiler.reset()
    torch.compile(fn, backend="gcu", options={**(options or {}), "dump": str(directory)})(*args)
