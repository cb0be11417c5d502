"""`gcu-compile target`: the facts that a target's checks and predictions rest on, and where each comes from."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gcu_compile.cli.report import JsonFile, write_json
from gcu_compile.options import resolve
from gcu_compile.targets.profile import PROFILES, load_profile

COLOURS = {"measured": "green", "documented": "cyan", "assumed": "yellow"}
Override = Annotated[
    str, typer.Option("--profile", help="YAML file that overrides facts; default: option target_profile.")
]


def written(value: Any) -> str:
    """A fact's value as one line of text."""
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {written(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(written, value)) or "none"
    return str(value)


def target(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(PROFILES)}.", metavar="TARGET")],
    profile_file: Override = "",
    json_file: JsonFile = None,
) -> None:
    """Print a target's facts with their units, sources and confidence."""
    file = profile_file or resolve().target_profile
    facts = load_profile(name, file).facts()
    write_json(json_file, {"target": name, "override_file": file, "facts": facts})
    table = Table("fact", "value", "unit", "confidence", "source", title=f"Facts of {name}", title_justify="left")
    for fact, entry in facts.items():
        confidence = entry["confidence"]
        shown = f"[{COLOURS[confidence]}]{confidence}[/]"
        table.add_row(fact, escape(written(entry["value"])), entry["unit"], shown, escape(entry["source"]))
    console = Console()
    console.print(table)
    counts = ", ".join(f"{sum(e['confidence'] == c for e in facts.values())} {c}" for c in COLOURS)
    console.print(f"{len(facts)} facts: {counts}.")
