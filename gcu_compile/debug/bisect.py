"""Finds what makes a compiled result wrong: Inductor, or one match of one rule, by halves.

    whole -> without Inductor -> without any step -> half of the steps ... one step -> half of its rules ... one rule
          -> half of its matches ... one match

A match is a place where a rule fired. With one culprit among s steps, r rules of its step and n matches of its rule
this takes about log2(s) + log2(r) + log2(n) + 4 compilations. The later half is switched off first: what fires later
may depend on what fired before, not the other way round, so that a canonical form is not blamed for a rule that it
only made possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gcu_compile import backend, recording
from gcu_compile.kernels.tolerance import TABLE, tolerance
from gcu_compile.lowering import pipeline
from gcu_compile.lowering.context import MatchRecord

# Length of the sums that a model's output value goes through: the usual order of a hidden size.
ACCUMULATION = 4096
SCHEMA = 1


@dataclass
class Culprit:
    """What `bisect` found.

    Attributes:
        kind: `nothing` (the results agree), `inductor`, `match`, `several` (no single match is to blame), or
            `elsewhere` (wrong without any rule and without Inductor: a decomposition or a fused operation).
        error: largest absolute difference of the compiled result from the eager one.
        runs: compilations that it took.
        step, rule, index, layer, node, source: of the match; empty for the other kinds. Graphs that are equal share
            their code: layer, node and source then name the places in all of them.
        graph: number of the match's graph; -1 where there is only one.
        options: that the search was started with.
    """

    kind: str
    error: float
    runs: int
    step: str = ""
    rule: str = ""
    index: int = -1
    layer: str = ""
    node: str = ""
    source: str = ""
    graph: int = -1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def remedy(self) -> dict[str, Any]:
        """What to add to the options for a right result; empty where there is nothing."""
        if self.kind == "match":
            name = f"{self.rule}@{self.index}" if self.graph < 0 else f"{self.rule}@{self.graph}.{self.index}"
            return {"disable_matches": [*_names(self.options.get("disable_matches")), name]}
        return {"inductor": False} if self.kind == "inductor" else {}

    def to_json(self) -> dict[str, Any]:
        """The attributes and the remedy; see docs/json.md."""
        return {"schema": SCHEMA, **asdict(self), "remedy": self.remedy}

    def __str__(self) -> str:
        graph = f" of graph {self.graph}" if self.graph >= 0 else ""
        what = {
            "nothing": "compiled and eager results agree",
            "inductor": "Inductor's generated code is wrong; the lowered graph, run eagerly, is right",
            "several": "no single match is to blame: several wrong ones, or two that go wrong together",
            "elsewhere": "wrong without any rule and without Inductor: a decomposition or a fused operation",
            "match": f"rule {self.rule}, match {self.index}{graph}, step {self.step}, node {self.node}"
            + (f", layer {self.layer}" if self.layer else "")
            + (f", {self.source}" if self.source else ""),
        }[self.kind]
        return f"{what} (largest difference {self.error:.2e}, {self.runs} compilations)"


# Options -> the results of compiling and running with them, and the matches that fired.
Run = Callable[[dict[str, Any]], tuple[list[torch.Tensor], list[MatchRecord]]]


class _Search:
    def __init__(self, run: Run, expected: list[torch.Tensor], options: Mapping[str, Any]):
        self.run, self.expected, self.options, self.runs = run, expected, dict(options), 0

    def wrong(self, **options: Any) -> tuple[float, list[MatchRecord]]:
        """Error beyond the tolerance (0: none), and the matches that fired."""
        self.runs += 1
        actual, matches = self.run({**self.options, **options})
        fired = [match for match in matches if match.status == "fused" and match.by == "gcu"]
        return max(map(_breach, actual, self.expected), default=0.0), fired


def bisect(fn: Callable, *args: Any, options: Mapping[str, Any] | None = None) -> Culprit:
    """Compare `fn` compiled with `fn` eager, and find the cause of a difference.

    Args:
        fn: deterministic; `args` are copied before each run, so that it may write to them.
        options: as for `torch.compile(backend="gcu")`; what they switch off stays off.
    """

    def run(given: dict[str, Any]) -> tuple[list[torch.Tensor], list[MatchRecord]]:
        torch.compiler.reset()
        recording.restart_numbers()
        before = len(backend.reports)
        compiled = torch.compile(fn, backend="gcu", options={**given, "cache": False})
        actual = _tensors(compiled(*_copies(args)))
        return actual, [match for report in backend.reports[before:] for match in report.matches]

    return search(run, _tensors(fn(*_copies(args))), options)


def search(
    run: Run, expected: list[torch.Tensor], options: Mapping[str, Any] | None = None, inductor: bool = True
) -> Culprit:
    """Find by halves what makes the results of `run` differ from the expected ones.

    Args:
        run: compiles and runs with the given options; graphs are numbered from 0 in each run.
        expected: what is right.
        options: those of every run; what they switch off stays off.
        inductor: whether `run` can do without Inductor. If not, a difference that is there without any rule is
            Inductor's, or that of something beside our lowering: kind `elsewhere`.
    """
    given = dict(options or {})
    search = _Search(run, expected, given)
    whole, fired = search.wrong()
    if not whole:
        return Culprit("nothing", 0.0, search.runs, options=given)
    off, error = {}, whole
    if inductor:
        off = {"inductor": False}
        error, fired = search.wrong(**off)
        if not error:
            return Culprit("inductor", whole, search.runs, options=given)
    steps = {rule.name: rule.step for rule in pipeline.all_rules()}

    def right_without(option: str, names: list[str]) -> bool:
        without = [*_names(given.get(option)), *names]
        return not search.wrong(**off, **{option: without})[0]

    if not right_without("disable_steps", list(pipeline.STEPS)):
        return Culprit("elsewhere", error, search.runs, options=given)
    for option, name in (
        ("disable_steps", lambda match: steps[match.rule]),
        ("disable_rules", lambda match: match.rule),
        ("disable_matches", lambda match: match.name),
    ):
        suspects = list(dict.fromkeys(map(name, fired)))
        if option == "disable_steps":
            suspects.sort(key=pipeline.STEPS.index)
        while len(suspects) > 1:
            later = suspects[len(suspects) // 2 :]
            suspects = later if right_without(option, later) else suspects[: len(suspects) // 2]
        several = len({match.graph for match in fired}) > 1
        fired = [match for match in fired if name(match) in suspects]
    if not fired or not right_without("disable_matches", [fired[0].name]):
        return Culprit("several", error, search.runs, options=given)
    first = fired[0]
    graph = first.graph if several else -1
    layer, node, source = (_joined(getattr(match, part) for match in fired) for part in ("layer", "node", "source"))
    found = (steps[first.rule], first.rule, first.index, layer, node, source, graph, given)
    return Culprit("match", error, search.runs, *found)


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, values)))


def _names(value: Any) -> list[str]:
    """An option's names, as a list or as comma-separated text."""
    return [name for name in value.split(",") if name] if isinstance(value, str) else list(value or ())


def script(culprit: Culprit, case: str, function: str, module: str = __name__) -> str:
    """A stand-alone script that fails as it is and passes with `--without` the culprit.

    Args:
        case: source text that defines `function`, which returns (subject, args).
        module: whose `bisect(subject, *args, options)` found it.
    """
    return SCRIPT.format(
        culprit=str(culprit).replace("\\", "/"),
        case=case,
        function=function,
        module=module,
        options=culprit.options,
        without={**culprit.options, **culprit.remedy},
    )


SCRIPT = '''"""{culprit}

    python THIS_FILE             # fails
    python THIS_FILE --without   # passes: {without}
"""

{case}

if __name__ == "__main__":
    import sys

    from {module} import bisect

    subject, args = {function}()
    found = bisect(subject, *args, options={without} if "--without" in sys.argv else {options})
    print(found)
    sys.exit(found.kind != "nothing")
'''

MODEL_CASE = """
def case():
    from gcu_compile.cli.explain import load

    return load({folder!r}, {length})
"""


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
