"""A cross-compiled model as the dump's HTML page: what the card gets, and what it is predicted to cost.

Each graph keeps the form that `page.data` gives (the fused map, options, the wrapper's code) and has `card` beside it:
the graph's part of `gcu-compile cross-compile --json`, which `card.js` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcu_compile.debug import page

NOT_SHOWN = ("wrapper", "lowering", "baseline", "seconds")


def data(result: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of `cross_compile`'s result, whose graphs have their `lowering` reports by now."""
    graphs = [_graph(result, name, entry, options) for name, entry in result["graphs"].items()]
    return {"schema": page.SCHEMA, "graphs": graphs}


def write(folder: Path, result: Mapping[str, Any], options: Mapping[str, Any]) -> Path:
    """Write `index.html` into `folder`, aside and then renamed."""
    return page.write_data(folder, data(result, options))


def _graph(
    result: Mapping[str, Any], name: str, entry: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    lowering, code = entry["lowering"], entry["wrapper"].splitlines()
    made = [{"name": one["name"], "by": "inductor", "calls": one["launches"]} for one in entry["kernels"]]
    called = [{"name": one["target"], "by": "call", "calls": one["count"]} for one in entry["calls"] if not one["view"]]
    card = {key: value for key, value in entry.items() if key not in NOT_SHOWN}
    if "baseline" in entry:
        card["baseline"] = entry["baseline"]["totals"]
    model = result["model"]["type"]
    return {
        "folder": name,
        "name": f"{model} {name}, {result['weights']}, batch {result['batch']}, {result['tokens']} tokens",
        "target": result["target"],
        "inference": True,
        "options": dict(options),
        "matches": lowering["matches"],
        "stages": [],
        "code": code,
        "definitions": page.definitions(code),
        "kernels": [*made, *called],
        "calls": [],
        "origins": {},
        "timing": {"parts": {"total": sum(entry["seconds"].values()), **entry["seconds"]}, "steps": {}},
        "card": card,
    }
