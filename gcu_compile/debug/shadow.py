"""The shadow check: every call of a fused operation also runs its eager meaning on the same inputs.

    GCU_COMPILE_SHADOW=1          compare with the meaning in the inputs' own dtypes
    GCU_COMPILE_SHADOW=float64    compare with the meaning in float64
    GCU_COMPILE_SHADOW_DIR=dir    save the inputs of a breach, with a script that runs them again

A breach of the tolerance table is logged with operation, rule, layer and shapes; at exit a table of every operation's
errors is printed. `mark` writes into a compiled graph where each call stands (`site`), and `enable` puts `Shadow` in
the registry's way; with the option off neither is called.
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_flatten, tree_map_only

from gcu_compile.kernels import registry
from gcu_compile.kernels.tolerance import TABLE, tolerance
from gcu_compile.lowering.provenance import layer_of
from gcu_compile.options import Options

log = logging.getLogger(__name__)
SAVED_PER_SITE = 3


@dataclass
class Statistic:
    """Errors of one operation at one place.

    Attributes:
        op, implementation: which operation, and what computed it.
        rule, layer, node: where it stands; empty for a call outside a graph that was compiled with the check on.
        calls, breaches: how often it was compared, and how often it was beyond the tolerance table.
        largest: the largest absolute difference.
        ratio: the largest difference in units of the tolerance; above 1 is a breach.
        unchecked: why a call could not be compared -> how often.
    """

    op: str
    implementation: str
    rule: str = ""
    layer: str = ""
    node: str = ""
    calls: int = 0
    breaches: int = 0
    largest: float = 0.0
    ratio: float = 0.0
    unchecked: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """The attributes as plain values."""
        return {**asdict(self), "unchecked": dict(self.unchecked)}


_found: dict[tuple[str, str, str], Statistic] = {}


def statistics() -> list[Statistic]:
    """Of every operation and place so far, in the order of their first calls."""
    return list(_found.values())


def reset() -> None:
    """Forget what was counted."""
    _found.clear()


def enable(options: Options) -> None:
    """Check every call of a fused operation in this process from now on; at exit a table is printed."""
    if registry.watcher is None:
        atexit.register(_summarise)
    registry.watcher = Shadow(options.shadow == "float64", options.shadow_dir)


def disable() -> None:
    """Stop checking."""
    registry.watcher = None
    atexit.unregister(_summarise)


def mark(graph: torch.fx.Graph) -> None:
    """Write into every call of a fused operation where it stands: `rule|layer|node`."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        functional = node.args and isinstance(node.args[0], torch._ops.OpOverload)  # auto_functionalized(op, ...)
        target = node.args[0] if functional else node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "gcu":
            near = (node, *node.users)  # a rule's result may be one of several outputs of the operation
            rule = next((n.meta["gcu_rule"] for n in near if "gcu_rule" in n.meta), "")
            layer = next(filter(None, map(layer_of, near)), "")
            node.kwargs = {**node.kwargs, "site": f"{rule}|{layer}|{node.name}"}


@dataclass
class Shadow:
    """The registry's watcher. `float64`: compare with the meaning in float64; `folder`: where breaches are saved."""

    float64: bool
    folder: str = ""

    def __call__(
        self, op: registry.FusedOp, implementation: str, run: Callable, site: str, args: tuple, kwargs: dict
    ) -> Any:
        written = written_arguments(op)
        before, blocks = narrowed(op, args, kwargs)
        before = _copied(written, *before)
        reference = _copied(written, *before)
        result = run(*args, **kwargs)
        found = _found.setdefault((op.name, implementation, site), _statistic(op.name, implementation, site))
        try:
            expected, doubled = self._meaning(op, *reference, found)
        except Exception as error:  # the check must not end what it watches
            found.unchecked[f"the meaning raised {type(error).__name__}: {error}"] += 1
            return result
        outputs = [result, *(blocks(x) for x in _written(written, args, kwargs))]
        length = op.accumulation(*args, **kwargs) if op.accumulation else None
        largest, ratio = compare(outputs, expected, length, 1 if doubled else 2, op.code_steps)
        found.calls += 1
        found.largest, found.ratio = max(found.largest, largest), max(found.ratio, ratio)
        if ratio > 1:
            found.breaches += 1
            self._breach(op, found, largest, ratio, before)
        return result

    def _meaning(self, op: registry.FusedOp, args: tuple, kwargs: dict, found: Statistic) -> tuple[list[Any], bool]:
        """The meaning's results and what it wrote; and whether it ran in float64."""
        written = written_arguments(op)
        if self.float64:
            wide = tree_map_only(torch.Tensor, _double, (args, kwargs))
            try:
                return [op.eager(*wide[0], **wide[1]), *_written(written, *wide)], True
            except Exception as error:
                found.unchecked[f"in float64: {type(error).__name__}: {error}"] += 1
        return [op.eager(*args, **kwargs), *_written(written, args, kwargs)], False

    def _breach(self, op: registry.FusedOp, found: Statistic, largest: float, ratio: float, before: tuple) -> None:
        shapes = ", ".join(f"{t.dtype}{list(t.shape)}".replace("torch.", "") for t in _tensors(before))
        place = " ".join(filter(None, (found.rule and f"rule {found.rule},", found.layer, found.node)))
        text = (
            f"gcu::{op.name} ({found.implementation}) differs from its meaning by {largest:.2e}, {ratio:.1f} times "
            f"the tolerance{', at ' + place if place else ''}; inputs {shapes}"
        )
        if self.folder and found.breaches <= SAVED_PER_SITE:
            text += f"; saved as {save(Path(self.folder), op.name, before, text)}"
        log.warning(text)


def compare(
    outputs: list[Any], expected: list[Any], length: int | None, times: int, steps: int = 0
) -> tuple[float, float]:
    """(largest absolute difference, largest difference over tolerance) of two lists of results.

    Args:
        length: of the sums in an output value; None: results must be equal. So must whole numbers, but for `steps`.
        times: how many results of that tolerance stand against each other: 1 where `expected` is float64, 2 where
            both carry the error that the table allows, one on each side.
        steps: how far integers may be apart: a quantised value next to a rounding edge may come out one step away.
    """
    largest, worst = 0.0, 0.0
    for actual, meant in zip(_tensors(outputs), _tensors(expected), strict=True):
        if actual.shape != meant.shape:
            return float("inf"), float("inf")
        if length is None or actual.dtype not in TABLE:
            same = torch.equal(actual.double(), meant.to(actual.dtype).double())
            difference = (actual.double() - meant.double()).abs().nan_to_num()
            furthest = difference.max().item() if difference.numel() else 0.0
            largest = max(largest, furthest)
            if not same:
                near = not actual.is_floating_point() and furthest <= steps
                worst = max(worst, furthest / steps if near else float("inf"))
            continue
        a, b = actual.double(), meant.double()
        finite = b[b.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 1.0
        allowed = tolerance(actual.dtype, length, scale or 1.0)
        both = a.isfinite() & b.isfinite()
        if not torch.equal(a[~both].nan_to_num(nan=0.5), b[~both].nan_to_num(nan=0.5)):
            return float("inf"), float("inf")
        difference = (a - b)[both].abs()
        if difference.numel():
            ratio = difference / (times * (allowed["atol"] + allowed["rtol"] * b[both].abs()))
            largest, worst = max(largest, difference.max().item()), max(worst, ratio.max().item())
    return largest, worst


def written_arguments(op: registry.FusedOp) -> set[int | str]:
    """Positions and names of the arguments that the operation writes."""
    schema = getattr(torch.ops.gcu, op.name).default._schema
    writes = [(n, a.name) for n, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    return {key for pair in writes for key in pair}


def narrowed(op: registry.FusedOp, args: tuple, kwargs: dict) -> tuple[tuple[tuple, dict], Callable]:
    """The call on no more of a paged cache than it touches, and what takes a written argument to that part.

    A cache may fill the memory, and a call of a step touches a few of its blocks; what a kernel writes beside them is
    not seen. A call with slots or blocks that do not exist is left whole: its meaning says what is wrong with it.
    """
    whole = (args, kwargs), lambda x: x
    if op.touched is None:
        return whole
    names = [argument.name for argument in getattr(torch.ops.gcu, op.name).default._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    try:
        part = op.touched(given)
        small = {**given, **part.moved, **{name: given[name][part.blocks] for name in part.paged}}
    except (IndexError, RuntimeError):
        return whole
    caches = {id(given[name]) for name in part.paged}

    def blocks(x: Any) -> Any:
        return x[part.blocks] if id(x) in caches else x

    positional = tuple(small[name] for name in names[: len(args)])
    return (positional, {name: small[name] for name in kwargs}), blocks


def save(folder: Path, name: str, inputs: tuple[tuple, dict], text: str) -> Path:
    """Save a call's inputs and a script that runs it again; the script's path."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        script = folder / f"{name}-{number}.py"
        try:
            with script.open("x") as stream:
                stream.write(SCRIPT.format(text=text))
            break
        except FileExistsError:
            number += 1
    args, kwargs = inputs
    torch.save({"op": name, "args": list(args), "kwargs": kwargs}, script.with_suffix(".pt"))
    return script


SCRIPT = '''"""{text}

    python THIS_FILE    # runs the call again beside its meaning; exit status 1 while they differ
"""

import sys
from pathlib import Path

from gcu_compile.debug.shadow import replay

statistic = replay(Path(__file__).with_suffix(".pt"))
print(statistic)
sys.exit(bool(statistic.breaches))
'''


def replay(file: Path, float64: bool = True) -> Statistic:
    """Run a saved call again, beside its meaning."""
    import gcu_compile.backend  # noqa: F401  (defines the operations)

    saved = torch.load(file, weights_only=True)
    op = registry.get(saved["op"])
    before, registry.watcher = registry.watcher, Shadow(float64)
    try:
        registry.dispatch(op, *saved["args"], site=f"|{file.stem}|", **saved["kwargs"])
    finally:
        registry.watcher = before
    return next(found for found in reversed(statistics()) if found.layer == file.stem)


def table() -> Table:
    """Errors by operation and rule, over all layers; the layer is that of the largest."""
    titles = ["operation", "by", "rule", "places", "calls", "breaches", "largest", "of tolerance", "worst at"]
    said = any(found.unchecked for found in statistics())
    made = Table(*titles, *(["unchecked"] if said else []), title="Shadow check", title_justify="left")
    groups: dict[tuple[str, str, str], list[Statistic]] = {}
    for found in statistics():
        groups.setdefault((found.op, found.implementation, found.rule), []).append(found)
    for (op, implementation, rule), places in groups.items():
        worst = max(places, key=lambda found: found.ratio)
        unchecked = sum((found.unchecked for found in places), Counter())
        row = [
            f"gcu::{op}",
            implementation,
            rule,
            str(len(places)),
            str(sum(found.calls for found in places)),
            str(sum(found.breaches for found in places)),
            f"{worst.largest:.1e}",
            f"{worst.ratio:.2f}",
            worst.layer or worst.node,
        ]
        reasons = "; ".join(f"{reason} x{times}" for reason, times in unchecked.items())
        made.add_row(*row, *([reasons] if said else []))
    return made


def _summarise() -> None:
    if _found:
        width = None if sys.stderr.isatty() else 160  # a log file has no width
        Console(stderr=True, width=width).print(table())


def _statistic(op: str, implementation: str, site: str) -> Statistic:
    rule, _, rest = site.partition("|")
    layer, _, node = rest.partition("|")
    return Statistic(op, implementation, rule, layer, node)


def _copied(written: set[int | str], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments, with copies of those that are written."""

    def copied(key: int | str, value: Any) -> Any:
        return tree_map_only(torch.Tensor, torch.clone, value) if key in written else value

    return tuple(copied(n, a) for n, a in enumerate(args)), {name: copied(name, v) for name, v in kwargs.items()}


def _written(written: set[int | str], args: tuple, kwargs: dict) -> list[Any]:
    return [a for n, a in enumerate(args) if n in written] + [kwargs[n] for n in sorted(kwargs) if n in written]


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.dtype in TABLE else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor))
