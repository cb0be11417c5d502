"""The kernels that a compiled graph calls, read from the wrapper that Inductor wrote, and who made each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# A call as Inductor's Python wrapper spells it -> who made what it calls.
CALLS = (
    (re.compile(r"\btorch\.ops\.gcu\.(\w+)\.\w+\("), "hand-written", "gcu::{}"),
    (re.compile(r"\btorch\.ops\.gcu_composite\.(\w+)\.\w+\("), "hand-written", "gcu_composite::{}"),
    (re.compile(r"\bgcu_direct\.(\w+)\("), "hand-written", "gcu::{}"),
    (re.compile(r"\btorch\.ops\.(\w+\.\w+)(?:\.\w+)?\("), "library", "{}"),
    (re.compile(r"\bextern_kernels\.(\w+)\("), "library", "extern_kernels.{}"),
    (re.compile(r"^\s*(\w*(?:cpp|triton|pallas)_\w+?)(?:\.run)?\("), "inductor", "{}"),
)
HANDLES = re.compile(r"# \[Provenance debug handles\] (\S+)")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a graph. `by`: inductor (generated), hand-written (ours), library (torch's or another's);
    `calls` per run of the graph."""

    name: str
    by: str
    calls: int


def kernels(code: str) -> list[Kernel]:
    """Every kernel that the wrapper calls, in the order of its first call."""
    found = Counter((call["kernel"], call["by"]) for call in calls(code))
    return [Kernel(name, by, times) for (name, by), times in found.items()]


def calls(code: str, provenance: Mapping[str, list[str]] | None = None) -> list[dict[str, Any]]:
    """Every call of a kernel in the wrapper, in order.

    Args:
        provenance: numbered kernel, as in the comment before its call -> the nodes that it computes.

    Returns:
        kernel, by (see `Kernel`), line (of the wrapper, from 1) and nodes of each call.
    """
    found, nodes = [], []
    for number, line in _running_lines(code):
        if handles := HANDLES.search(line):
            nodes = (provenance or {}).get(handles[1], [])
            continue
        for pattern, by, name in CALLS:
            if match := pattern.search(line):
                found.append({"kernel": name.format(match[1]), "by": by, "line": number, "nodes": list(nodes)})
                nodes = []
                break
    return found


def _running_lines(code: str) -> Iterator[tuple[int, str]]:
    """The numbered lines that run on every call: the bodies of `call` and of graph partitions."""
    inside, indent = False, 0
    for number, line in enumerate(code.splitlines(), 1):
        stripped = line.lstrip()
        depth = len(line) - len(stripped)
        if stripped.startswith(("def call(", "def partition_")):
            inside, indent = True, depth
        elif inside and stripped and depth <= indent:
            inside = False
        elif inside and (not stripped.startswith("#") or HANDLES.search(line)):
            yield number, line
