"""The kernels that a compiled graph calls, read from the wrapper that Inductor wrote, and who made each."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# A call as Inductor's Python wrapper spells it -> who made what it calls.
CALLS = (
    (re.compile(r"\btorch\.ops\.gcu\.(\w+)\.\w+\("), "hand-written", "gcu::{}"),
    (re.compile(r"\btorch\.ops\.(\w+\.\w+)(?:\.\w+)?\("), "library", "{}"),
    (re.compile(r"\bextern_kernels\.(\w+)\("), "library", "extern_kernels.{}"),
    (re.compile(r"^\s*(\w*(?:cpp|triton|pallas)_\w+?)(?:\.run)?\("), "inductor", "{}"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a graph. `by`: inductor (generated), hand-written (ours), library (torch's or another's);
    `calls` per run of the graph."""

    name: str
    by: str
    calls: int


def kernels(code: str) -> list[Kernel]:
    """Every kernel that the wrapper calls, in the order of its first call."""
    found: Counter[tuple[str, str]] = Counter()
    for line in call_lines(code):
        for pattern, by, name in CALLS:
            if match := pattern.search(line):
                found[name.format(match[1]), by] += 1
                break
    return [Kernel(name, by, calls) for (name, by), calls in found.items()]


def call_lines(code: str) -> list[str]:
    """The lines of the wrapper that run on every call: the bodies of `call` and of graph partitions."""
    lines, inside, indent = [], False, 0
    for line in code.splitlines():
        stripped = line.lstrip()
        depth = len(line) - len(stripped)
        if stripped.startswith(("def call(", "def partition_")):
            inside, indent = True, depth
        elif inside and stripped and depth <= indent:
            inside = False
        elif inside and not stripped.startswith("#"):
            lines.append(line)
    return lines
