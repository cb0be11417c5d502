"""Finds what makes a compiled result wrong: Inductor, or one match of one rule, by halves.

    whole -> without Inductor -> without any rule -> half of the matches -> ... -> one match

A match is a place where a rule fired. With one culprit among n matches this takes about log2(n) + 4 compilations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gcu_compile import backend
from gcu_compile.kernels.tolerance import TABLE, tolerance
from gcu_compile.lowering.context import MatchRecord

# Length of the sums that a model's output value goes through: the usual order of a hidden size.
ACCUMULATION = 4096


@dataclass
class Culprit:
    """What `bisect` found.

    Attributes:
        kind: `nothing` (the results agree), `inductor`, `match`, `several` (no single match is to blame), or
            `elsewhere` (wrong without any rule and without Inductor: a decomposition or a fused operation).
        error: largest absolute difference of the compiled result from the eager one.
        runs: compilations that it took.
        rule, index, layer, node, source: of the match; empty for the other kinds.
    """

    kind: str
    error: float
    runs: int
    rule: str = ""
    index: int = -1
    layer: str = ""
    node: str = ""
    source: str = ""

    @property
    def remedy(self) -> dict[str, Any]:
        """Options with which the result is right; empty where there are none."""
        if self.kind == "match":
            return {"disable_matches": [f"{self.rule}@{self.index}"]}
        return {"inductor": False} if self.kind == "inductor" else {}

    def to_json(self) -> dict[str, Any]:
        """The attributes and the remedy."""
        return {**asdict(self), "remedy": self.remedy}

    def __str__(self) -> str:
        what = {
            "nothing": "compiled and eager results agree",
            "inductor": "Inductor's generated code is wrong; the lowered graph, run eagerly, is right",
            "several": "no single match is to blame: several wrong ones, or two that go wrong together",
            "elsewhere": "wrong without any rule and without Inductor: a decomposition or a fused operation",
            "match": f"rule {self.rule}, match {self.index}, node {self.node}"
            + (f", layer {self.layer}" if self.layer else "")
            + (f", {self.source}" if self.source else ""),
        }[self.kind]
        return f"{what} (largest difference {self.error:.2e}, {self.runs} compilations)"


class _Search:
    def __init__(self, fn: Callable, args: tuple[Any, ...], options: Mapping[str, Any]):
        self.fn, self.args, self.options, self.runs = fn, args, dict(options), 0
        self.expected = _tensors(fn(*_copies(args)))

    def wrong(self, **options: Any) -> tuple[float, list[MatchRecord]]:
        """Error beyond the tolerance (0: none), and the matches that fired."""
        self.runs += 1
        torch.compiler.reset()
        before = len(backend.reports)
        compiled = torch.compile(self.fn, backend="gcu", options={**self.options, **options, "cache": False})
        actual = _tensors(compiled(*_copies(self.args)))
        matches = [match for report in backend.reports[before:] for match in report.matches]
        fired = [match for match in matches if match.status == "fused" and match.by == "gcu"]
        return max(map(_breach, actual, self.expected), default=0.0), fired


def bisect(fn: Callable, *args: Any, options: Mapping[str, Any] | None = None) -> Culprit:
    """Compare `fn` compiled with `fn` eager, and find the cause of a difference.

    Args:
        fn: deterministic; `args` are copied before each run, so that it may write to them.
        options: as for `torch.compile(backend="gcu")`; what they switch off stays off.
    """
    search = _Search(fn, args, options or {})
    whole, _ = search.wrong()
    if not whole:
        return Culprit("nothing", 0.0, search.runs)
    error, fired = search.wrong(inductor=False)
    if not error:
        return Culprit("inductor", whole, search.runs)
    given = tuple((options or {}).get("disable_matches", ()))

    def wrong_without(matches: list[MatchRecord]) -> float:
        names = [*given, *(f"{m.rule}@{m.index}" for m in matches)]
        return search.wrong(inductor=False, disable_matches=names)[0]

    if wrong_without(fired):
        return Culprit("elsewhere", error, search.runs)
    suspects = fired
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        suspects = suspects[len(half) :] if wrong_without(half) else half
    (found,) = suspects
    if wrong_without([found]):
        return Culprit("several", error, search.runs)
    return Culprit("match", error, search.runs, found.rule, found.index, found.layer, found.node, found.source)


def script(culprit: Culprit, case: str, function: str) -> str:
    """A stand-alone script that fails as it is and passes with `--without` the culprit.

    Args:
        case: source text of the file that defines `function`, which returns (fn, args).
    """
    return SCRIPT.format(
        culprit=culprit, case=case, function=function, remedy=culprit.remedy
    )


SCRIPT = '''"""{culprit}

    python THIS_FILE             # fails
    python THIS_FILE --without   # passes: {remedy}
"""

{case}

if __name__ == "__main__":
    import sys

    from gcu_compile.debug.bisect import bisect

    fn, args = {function}()
    found = bisect(fn, *args, options={remedy} if "--without" in sys.argv else {{}})
    print(found)
    sys.exit(found.kind != "nothing")
'''


def _copies(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, values)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _breach(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference if it is beyond the tolerance table, else 0. Integers must be equal."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.dtype not in TABLE:
        return 0.0 if torch.equal(actual, expected) else float("inf")
    a, b = actual.double(), expected.double()
    finite = b[b.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    if torch.allclose(a, b, **tolerance(expected.dtype, ACCUMULATION, scale), equal_nan=True):
        return 0.0
    difference = (a - b).abs()
    return difference[difference.isfinite()].max().item() if difference.isfinite().any() else float("inf")
