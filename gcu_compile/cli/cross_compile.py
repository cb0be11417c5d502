"""`gcu-compile cross-compile`: what a model becomes on a card, with no card here."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gcu_compile.cli.report import JsonFile, write_json
from gcu_compile.cli.target import Override
from gcu_compile.debug import card_page
from gcu_compile.debug.dump import PLACES
from gcu_compile.errors import UnknownNameError
from gcu_compile.options import resolve
from gcu_compile.targets.profile import PROFILES

Model = Annotated[str, typer.Argument(help="A Hugging Face model folder, or a config.json alone.", metavar="MODEL")]
SHOWN = 12


def cross_compile(
    model: Model,
    target: Annotated[str, typer.Option("--target", help=f"One of {', '.join(PROFILES)}.")] = "gcu300",
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the prompt, and of decode's cache.")] = 2048,
    weights: Annotated[str, typer.Option("--weights", help="bf16, fp16, or w4a16 (4-bit weights).")] = "bf16",
    graphs: Annotated[str, typer.Option("--graphs", help="Which graphs, by comma.")] = "prefill,decode",
    layers: Annotated[int, typer.Option("--layers", help="Only the first N layers; 0: all.")] = 0,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also Inductor's own Triton scheduling.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for sources, TTIR, reports and a page.")] = None,
    profile_file: Override = "",
    json_file: JsonFile = None,
) -> None:
    """Compile a model's prefill and decode graphs for a card that need not be here: config alone, no weights.

    Exit status: 0 legal, 1 a kernel that would abort, be refused or give wrong numbers, 2 the model cannot be compiled.
    """
    if target not in PROFILES:
        raise UnknownNameError("target profile", target, PROFILES)
    from gcu_compile.backend import LoweringPass, reports
    from gcu_compile.codegen import cross, models

    options = resolve({"target": target})
    config = models.read_config(Path(model))
    if layers:
        config.num_hidden_layers = layers
    lowered: list[Any] = []

    def lowering() -> LoweringPass:
        lowered.append(len(reports))
        return LoweringPass(options, target)

    result = cross.cross_compile(
        config,
        target,
        lowering=lowering,
        batch=batch,
        tokens=tokens,
        weights=weights,
        graphs=[name.strip() for name in graphs.split(",") if name.strip()],
        baseline=baseline,
        profile_file=profile_file or options.target_profile,
    )
    for entry, first in zip(result["graphs"].values(), lowered, strict=True):
        entry["lowering"] = reports[first].to_json()
    result["model"] = {"type": config.model_type, "source": Path(model).name}
    console = Console()
    for name, entry in result["graphs"].items():
        show(console, f"{name}, {target}, {weights}, batch {batch}, {tokens} tokens", entry)
    if out is not None:
        save(out, result)
        card_page.write(out, result, {name: value for name, value in asdict(options).items() if name not in PLACES})
        console.print(f"Sources, TTIR and reports: {out}; as a page: {out / 'index.html'}", highlight=False)
    write_json(json_file, result)
    if any(e["totals"]["aborts"] or e["totals"]["errors"] for e in result["graphs"].values()):
        raise typer.Exit(1)


def show(console: Console, title: str, entry: dict[str, Any]) -> None:
    """Print one graph: what takes longest, what was fused, totals."""
    table = Table("kernel or call", "times", "us", "bound", "verdict", title=title, title_justify="left")
    rows = [(k["name"], k["launches"], k["cost"], _verdict(k)) for k in entry["kernels"]]
    rows += [(c["target"], c["count"], c["cost"], "call") for c in entry["calls"] if not c["view"]]
    rows.sort(key=lambda row: -(row[2] or {"microseconds": 0})["microseconds"])
    for name, times, cost, verdict in rows[:SHOWN]:
        spent = (f"{cost['microseconds']:.0f}", cost["bound"]) if cost else ("?", "?")
        table.add_row(escape(name), str(times), *spent, verdict)
    if len(rows) > SHOWN:
        rest = sum(row[2]["microseconds"] for row in rows[SHOWN:] if row[2])
        table.add_row(f"{len(rows) - SHOWN} more", "", f"{rest:.0f}", "", "")
    console.print(table)
    totals = entry["totals"]
    console.print(summary(totals), highlight=False)
    for gather in totals["gathers"]:
        console.print(f"  gather in {gather['kernel']}: {gather['why']}", highlight=False, markup=False)
    fused = entry["lowering"]["fused"] if "lowering" in entry else {}
    console.print(f"rules fired: {', '.join(f'{r} x{n}' for r, n in fused.items()) or 'none'}", highlight=False)
    if "baseline" in entry:
        console.print(f"Inductor's own scheduling: {summary(entry['baseline']['totals'])}", highlight=False)


def summary(totals: dict[str, Any]) -> str:
    """One line about a graph."""
    return (
        f"{totals['kernels']} kernels, {totals['kernel_launches']} launches, {totals['calls']} calls: predicted "
        f"{totals['microseconds'] / 1e3:.2f} ms; {totals['aborts']} aborts, {totals['errors']} errors, "
        f"{totals['wide']} 64-bit values, {totals['known_wrong']} known-wrong patterns; "
        f"{100 * totals['dma_share']:.2f} % of the kernels' bytes are DMA slices"
    )


def _verdict(kernel: dict[str, Any]) -> str:
    if kernel["error"]:
        return "[red]does not compile[/]"
    report = kernel["report"]
    if not report["legal"]:
        return "[bold red]illegal[/]"
    gathers = sum(a["verdict"] == "gather" for a in report["accesses"])
    return f"[yellow]{gathers} gathers[/]" if gathers else "[green]slices[/]"


def save(folder: Path, result: dict[str, Any]) -> None:
    """Write sources, TTIR and reports, each aside and then renamed.

    <graph>/wrapper.py, <graph>/kernels/<name>.py and .ttir, <graph>/report.json; `card_page` adds index.html
    """
    for name, entry in result["graphs"].items():
        place = folder / name
        (place / "kernels").mkdir(parents=True, exist_ok=True)
        _write(place / "wrapper.py", entry["wrapper"])
        for kernel in entry["kernels"]:
            _write(place / "kernels" / f"{kernel['name']}.py", kernel["triton"] + "\n")
            _write(place / "kernels" / f"{kernel['name']}.ttir", kernel["ttir"])
        light = {key: value for key, value in entry.items() if key not in ("wrapper", "baseline")}
        light["kernels"] = [{k: v for k, v in one.items() if k not in ("triton", "ttir")} for one in entry["kernels"]]
        _write(place / "report.json", json.dumps(light, indent=2, default=str) + "\n")


def _write(file: Path, text: str) -> None:
    handle, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
    os.replace(aside, file)
