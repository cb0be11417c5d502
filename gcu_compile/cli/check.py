"""`gcu-compile check`: would these Triton kernels work on a GCU? Answered without a card."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gcu_compile.cli.report import JsonFile, write_json
from gcu_compile.cli.target import Override
from gcu_compile.errors import GcuCompileError, InvalidInputError
from gcu_compile.options import resolve
from gcu_compile.targets.cost import predict
from gcu_compile.targets.legality import Report, Specimen, check_kernel, ttir_of
from gcu_compile.targets.profile import PROFILES, Profile, load_profile
from gcu_compile.targets.triton_private import is_kernel, kernel_name, kernel_place, kernels_called
from gcu_compile.targets.ttir import parse

COLOURS = {"abort": "bold red", "error": "red", "slow": "yellow", "note": "dim"}
VERDICTS = {"dma slice": "green", "scalar dma": "green", "gather": "yellow", "abort": "bold red", "atomic": "cyan"}
HOW_TO = """Add specimens at the end of the file, one per launch worth checking:

LEGALITY_SPECIMENS = [
    {"kernel": my_kernel, "signature": {"x_ptr": "*fp16", "n": "i32"}, "constexprs": {"BLOCK": 4096},
     "grid": (24,), "num_warps": 4, "values": {"n": 1048576}},
]"""
Target = Annotated[str, typer.Option("--target", help=f"One of {', '.join(PROFILES)}.")]


def check(
    path: Annotated[Path, typer.Argument(help="A Python file with Triton kernels, or a folder of them.")],
    target: Target = "gcu300",
    profile_file: Override = "",
    strict: Annotated[bool, typer.Option("--strict", help="Status 1 too if a kernel was not checked.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Check the Triton kernels of a file or folder against a target's rules.

    A device function is checked inside the kernels that call it: Triton compiles it into them.

    Exit status: 0 legal, 1 a kernel that would abort, be refused or give wrong numbers (with --strict, or that no
    specimen reaches), 2 nothing could be checked.
    """
    profile = load_profile(target, profile_file or resolve().target_profile)
    files = kernel_files(path)
    console = Console()
    modules = [(file, load(file)) for file in files]
    specimens = {file: specimens_of(module, file) for file, module in modules}
    callers = callers_of(one.kernel for found in specimens.values() for one in found)
    entries, legal, checked, missed = [], True, 0, 0
    for file, module in modules:
        kernels = []
        for specimen in specimens[file]:
            report, cost = examine(specimen, profile)
            show(console, report, cost)
            kernels.append(report.as_dict() | {"cost": cost})
            legal, checked = legal and report.legal, checked + 1
        within, left = coverage(module, callers)
        if within:
            through = sorted({caller for names in within.values() for caller in names})
            words = f"{file.name}: checked inside {', '.join(through)}: {', '.join(within)}."
            console.print(words, highlight=False, style="dim", soft_wrap=True)
        if left:
            console.print(
                f"{file}: no specimen reaches {', '.join(left)}; not checked.", style="yellow", highlight=False
            )
        entries.append({"file": str(file), "kernels": kernels, "checked_within": within, "not_checked": left})
        missed += len(left)
    write_json(json_file, {"target": target, "legal": legal, "checked": checked, "files": entries})
    if not checked:
        console.print(HOW_TO, highlight=False, markup=False)
        raise InvalidInputError(f"nothing to check: no LEGALITY_SPECIMENS in {path}")
    words = f"{checked} specimens in {len(files)} files: {'legal' if legal else 'not legal'} on {target}"
    console.print(f"{words}{f'; {missed} kernels not checked' if missed else ''}.", highlight=False)
    if not legal or (strict and missed):
        raise typer.Exit(1)


def kernel_files(path: Path) -> list[Path]:
    """The file itself, or every Python file under a folder that has a Triton kernel.

    Raises:
        InvalidInputError: no such file or folder, or no kernel in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InvalidInputError(f"no file or folder {path}")
    found = [f for f in sorted(path.rglob("*.py")) if "@triton.jit" in f.read_text(errors="replace")]
    if not found:
        raise InvalidInputError(f"no Python file under {path} holds a @triton.jit kernel")
    return found


def load(file: Path) -> ModuleType:
    """Import a file by its path; its folder is importable meanwhile, for the helpers beside it.

    Raises:
        InvalidInputError: the file raises when imported.
    """
    name = f"gcu_check_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InvalidInputError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Triton looks a kernel's module up by name.
    sys.modules[name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except GcuCompileError:
        raise
    except Exception as error:
        raise InvalidInputError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def specimens_of(module: ModuleType, file: Path) -> list[Specimen]:
    """The file's specimens, checked for their keys.

    Raises:
        UnknownNameError, InvalidInputError: a specimen that is not one; says which.
    """
    entries = getattr(module, "LEGALITY_SPECIMENS", [])
    if not isinstance(entries, (list, tuple)):
        raise InvalidInputError(f"{file}: LEGALITY_SPECIMENS is a list of mappings, not {type(entries).__name__}")
    return [Specimen.of(entry, f"{file}: LEGALITY_SPECIMENS[{index}]") for index, entry in enumerate(entries)]


def callers_of(launched: Iterable[Any]) -> dict[tuple[str, str], list[str]]:
    """Place of each kernel that is compiled when `launched` ones are: names of those that it is compiled for."""
    found: dict[tuple[str, str], list[str]] = {}
    for kernel in launched:
        todo, name = [kernel], kernel_name(kernel)
        while todo:
            one = todo.pop()
            names = found.setdefault(kernel_place(one), [])
            if name not in names:
                names.append(name)
                todo += kernels_called(one)
    return found


def coverage(
    module: ModuleType, callers: Mapping[tuple[str, str], list[str]]
) -> tuple[dict[str, list[str]], list[str]]:
    """Device functions of a file with the kernels that they are checked inside, and what nothing reaches."""
    own = {n: k for n, k in vars(module).items() if is_kernel(k) and _module_of(k) == module.__name__}
    within = {n: sorted(set(callers.get(kernel_place(k), ())) - {kernel_name(k)}) for n, k in own.items()}
    left = sorted(n for n, k in own.items() if kernel_place(k) not in callers)
    return {n: through for n, through in sorted(within.items()) if through}, left


def _module_of(kernel: Any) -> str:
    return getattr(kernel, "__module__", "") or ""


def examine(specimen: Specimen, profile: Profile) -> tuple[Report, dict[str, Any] | None]:
    """Findings and predicted cost of one specimen; no cost for a kernel that does not compile."""
    report = check_kernel(specimen, profile)
    if any(finding.rule == "compiles" for finding in report.findings):
        return report, None
    module = parse(ttir_of(specimen, profile))
    return report, predict(module, profile, specimen.launch, specimen.values).as_dict()


def show(console: Console, report: Report, cost: dict[str, Any] | None) -> None:
    """Print one kernel: its accesses, its findings, its cost."""
    table = Table("severity", "rule", "where", "finding", "remedy", title=report.kernel, title_justify="left")
    for access in report.accesses:
        tile = "x".join(map(str, (*access.shape, access.element)))
        why = f": {', '.join(access.reasons)}" if access.reasons else ""
        verdict = f"[{VERDICTS[access.verdict]}]{access.verdict}[/]"
        table.add_row(verdict, "", _where(access.file, access.line), escape(f"{access.operation} {tile}{why}"), "")
    if report.accesses and report.findings:
        table.add_section()
    for finding in report.findings:
        severity = f"[{COLOURS[finding.severity]}]{finding.severity}[/]"
        where = _where(finding.file, finding.line)
        table.add_row(severity, finding.rule, where, escape(finding.message), escape(finding.remedy))
    console.print(table)
    if cost:
        console.print(f"predicted {cost['microseconds']:.1f} us, bound by {cost['bound']}", highlight=False)


def _where(file: str, line: int) -> str:
    return f"{Path(file).name}:{line}" if line else ""
