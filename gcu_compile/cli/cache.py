"""`gcu-compile cache`: what is kept, and why something was compiled again."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gcu_compile.cli.report import JsonFile, write_json
from gcu_compile.options import resolve

cache = typer.Typer(help="The compile cache: what is kept, and why something was compiled again.", no_args_is_help=True)
Key = Annotated[str, typer.Argument(help="A key, or as much of its beginning as no other shares.")]
Folder = Annotated[Path | None, typer.Option("--dir", help="The cache folder; default: option cache_dir.")]


def _store(folder: Path | None):
    from gcu_compile.cache.store import Store

    return Store(folder or resolve().effective_cache_dir())


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@cache.command("list")
def list_entries(folder: Folder = None, json_file: JsonFile = None) -> None:
    """Every entry, newest first; damaged files with what is wrong with them."""
    store = _store(folder)
    entries, damaged = store.entries()
    rows = [
        {
            "key": entry.key,
            "created": entry.created,
            "graph": entry.ingredients["graph"]["name"],
            "target": entry.ingredients["target"],
            "fused": sum(match["status"] == "fused" for report in entry.reports for match in report["matches"]),
            "kernels": sum(map(len, entry.kernels)),
            "seconds": entry.seconds.get("total", 0.0),
            "bytes": store.path(entry.key).stat().st_size,
            "bypass": entry.bypass,
        }
        for entry in entries
    ]
    write_json(json_file, {"schema": 1, "folder": str(store.folder), "entries": rows, "damaged": damaged})
    table = Table("key", "made", "graph", "target", "fused", "kernels", "compile s", "KiB")
    for row in rows:
        numbers = (str(row["fused"]), str(row["kernels"]), f"{row['seconds']:.2f}", f"{row['bytes'] / 1024:.1f}")
        table.add_row(row["key"][:12], _when(row["created"]), row["graph"], row["target"], *numbers)
    console = Console()
    console.print(table if rows else f"no entries in {store.folder}", soft_wrap=not rows)
    bypassed = {row["key"][:12]: f"a miss every time: {row['bypass']}" for row in rows if row["bypass"]}
    for name, reason in (bypassed | damaged).items():
        console.print(f"{name}: {reason}", style="yellow", highlight=False)


@cache.command("diff")
def diff(a: Key, b: Key, folder: Folder = None, json_file: JsonFile = None) -> None:
    """The ingredients in which two keys differ. Exit status 1 if there are any."""
    from gcu_compile.cache.key import differences

    store = _store(folder)
    first, second = store.find(a), store.find(b)
    changed = differences(first.ingredients, second.ingredients)
    write_json(json_file, {"schema": 1, "a": first.key, "b": second.key, "changed": changed})
    Console().print(_table(changed, first.key, second.key) if changed else "the same")
    raise typer.Exit(bool(changed))


@cache.command("explain")
def explain(
    key: Annotated[str, typer.Argument(help="A key or its beginning; default: the newest entry.")] = "",
    folder: Folder = None,
    json_file: JsonFile = None,
) -> None:
    """Which ingredient made an entry a miss: what differs from the entry made before of the same graph."""
    from gcu_compile.cache.doctor import Diagnosis, diagnose

    store = _store(folder)
    entries, _ = store.entries()
    if not entries and not key:
        typer.echo(f"no entries in {store.folder}")
        write_json(json_file, {"schema": 1, "entry": "", "nearest": "", "changed": {}, "bypass": ""})
        return
    found: Diagnosis = diagnose(store.find(key) if key else entries[0], entries)
    write_json(json_file, {"schema": 1, **asdict(found)})
    console = Console()
    console.print(str(found), soft_wrap=True, highlight=False)
    if found.changed:
        console.print(_table(found.changed, found.nearest, found.entry))


@cache.command("clear")
def clear(
    older_than: Annotated[float, typer.Option(help="Only entries older than this many days.")] = 0.0,
    folder: Folder = None,
    json_file: JsonFile = None,
) -> None:
    """Remove entries; Inductor then compiles their graphs again."""
    store = _store(folder)
    removed = store.clear(older_than * 86400)
    write_json(json_file, {"schema": 1, "folder": str(store.folder), "removed": removed})
    typer.echo(f"{removed} entries removed from {store.folder}")


def _table(changed: dict[str, tuple[Any, Any]], old: str, new: str) -> Table:
    table = Table("ingredient", old[:12], new[:12])
    for name, values in changed.items():
        table.add_row(name, *("(none)" if value is None else str(value) for value in values))
    return table
