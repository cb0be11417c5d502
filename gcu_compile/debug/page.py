"""The dump as one HTML page: no server, no other file, no address outside it.

`data(folder)` reads the dump's folders; `write(folder)` puts it as JSON into `page.html`, with `page.css` and
scripts (`SCRIPTS`). The page's contract is `data`'s result: `docs/json.md`, `tests/debug/test_page.py`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCHEMA = 1
SCRIPTS = ("page.js", "card.js", "start.js")
DEFINITION = re.compile(r"^(\w+) = async_compile\.\w+\(")


def data(folder: Path) -> dict[str, Any]:
    """What the page shows: {"schema", "graphs"}, the graphs in the order of their numbers."""
    graphs = [_graph(graph) for graph in sorted(folder.glob("graph-*")) if (graph / "timing.json").is_file()]
    return {"schema": SCHEMA, "graphs": graphs}


def write(folder: Path) -> Path:
    """Write `index.html` for the graphs in `folder`, aside and then renamed."""
    return write_data(folder, data(folder))


def write_data(folder: Path, found: dict[str, Any]) -> Path:
    """Write `index.html` with what `data` gives, or `card_page.data`."""
    # A JSON text inside a script element must not hold "</script>" or "<!--".
    text = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "page.html").read_text()
    scripts = "".join((HERE / name).read_text() for name in SCRIPTS)
    for name, value in (("CSS", (HERE / "page.css").read_text()), ("JS", scripts)):
        page = page.replace(f"/*{name}*/", value)
    page = page.replace("/*DATA*/", text)
    handle, aside = tempfile.mkstemp(dir=folder, prefix=".index-", suffix=".html")
    with os.fdopen(handle, "w") as stream:
        stream.write(page)
    os.chmod(aside, 0o644)
    os.replace(aside, folder / "index.html")
    return folder / "index.html"


def _graph(folder: Path) -> dict[str, Any]:
    about, kernels, origins, timing = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("about", "kernels", "origins", "timing")
    )
    stages, before = [], None
    for number, stage in enumerate(about["stages"]):
        lines = (folder / f"{number:02}-{stage['name']}.txt").read_text().splitlines()
        same = lines == before
        changes = None if before is None or same else _changes(before, lines)
        # Lines stand once: a stage that changed nothing has none, one that did has its own and the changes.
        stages.append({**stage, "lines": None if same else lines, "changes": changes})
        before = lines
    code_file = next(iter(folder.glob("*-code.py")), None)
    code = code_file.read_text().splitlines() if code_file else []
    return {
        "folder": folder.name,
        **{name: about[name] for name in ("name", "target", "inference", "options", "matches")},
        "stages": stages,
        "code": code,
        "definitions": definitions(code),
        "kernels": kernels["kernels"],
        "calls": kernels["calls"],
        "origins": origins,
        "timing": timing,
    }


def _changes(before: list[str], after: list[str]) -> list[list[Any]]:
    """[tag, start and end before, start and end after] of every changed run of lines."""
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    matcher = difflib.SequenceMatcher(
        None, before[start : len(before) - end], after[start : len(after) - end], autojunk=False
    )
    return [
        [tag, a + start, b + start, c + start, d + start]
        for tag, a, b, c, d in matcher.get_opcodes()
        if tag != "equal"
    ]


def definitions(code: list[str]) -> dict[str, list[int]]:
    """Kernel -> first and last line (from 1) of its definition in the wrapper."""
    found: dict[str, list[int]] = {}
    name, start = "", 0
    for number, line in enumerate(code, 1):
        if match := DEFINITION.match(line):
            name, start = match[1], number
        elif name and line.startswith("'''"):
            found[name] = [start, number]
            name = ""
    return found
