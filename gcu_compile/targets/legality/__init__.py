"""Would this Triton kernel work on a GCU, and how fast are its memory accesses? Answered from its TTIR alone.

>>> report = check_kernel(Specimen(kernel, {"x": "*fp16", "n": "i32"}, {"BLOCK": 4096}), load_profile("gcu300"))
>>> [finding.rule for finding in report.findings]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gcu_compile.errors import InvalidInputError, KernelBuildError, UnknownNameError
from gcu_compile.targets.legality.addresses import ACCESSES, Access, examine
from gcu_compile.targets.legality.checks import (
    check_accesses,
    check_compute,
    check_operations,
    check_patterns,
    check_types,
)
from gcu_compile.targets.legality.launch import (
    Breach,
    Footprint,
    Launch,
    check_launch,
    check_memory,
    check_stages,
    footprint,
)
from gcu_compile.targets.legality.rules import RULES, SEVERITIES, rule
from gcu_compile.targets.profile import Profile
from gcu_compile.targets.triton_private import compile_ttir, is_kernel, kernel_name
from gcu_compile.targets.ttir import Module, Op, parse

__all__ = ["AccessReport", "Finding", "Launch", "Report", "Specimen", "check_kernel", "check_ttir", "ttir_of"]
SPECIMEN_KEYS = ("kernel", "signature", "constexprs", "grid", "num_warps", "num_stages", "values", "name")


@dataclass(frozen=True)
class Specimen:
    """One launch of one kernel.

    signature: argument name to Triton type. constexprs: values of the constexpr arguments. values: what integer
    arguments are at this launch (the cost model counts loops with them). name: shown in reports.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] = (1,)
    num_warps: int = 4
    num_stages: int = 3
    values: Mapping[str, int] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def of(cls, entry: Any, where: str = "") -> Specimen:
        """The specimen that a mapping of `LEGALITY_SPECIMENS` describes.

        Raises:
            UnknownNameError: a key that no specimen has.
            InvalidInputError: no kernel, no signature, or not a mapping.
        """
        if not isinstance(entry, Mapping):
            raise InvalidInputError(f"{where}: a specimen is a mapping with {', '.join(SPECIMEN_KEYS)}, not {entry!r}")
        for key in entry:
            if key not in SPECIMEN_KEYS:
                raise UnknownNameError("key of a specimen", key, SPECIMEN_KEYS, where)
        if not is_kernel(entry.get("kernel")) or not isinstance(entry.get("signature"), Mapping):
            raise InvalidInputError(f"{where}: a specimen needs `kernel`, a @triton.jit function, and `signature`")
        grid = entry.get("grid", (1,))
        specimen = cls(**{**entry, "grid": (grid,) if isinstance(grid, int) else tuple(grid)})
        return specimen if specimen.name else replace(specimen, name=kernel_name(specimen.kernel))

    @property
    def launch(self) -> Launch:
        """Grid, warps and stages.

        Raises:
            InvalidValueError: one of them is not a positive number.
        """
        return Launch(self.grid, self.num_warps, self.num_stages)


@dataclass(frozen=True)
class Finding:
    """One breach of one rule. `line` is 0 where it belongs to no line."""

    rule: str
    severity: str
    message: str
    file: str = ""
    line: int = 0
    operation: str = ""
    remedy: str = ""
    source: str = ""


@dataclass(frozen=True)
class AccessReport:
    """The verdict on one memory access: dma slice, scalar dma, gather, abort or atomic. Strides in elements."""

    operation: str
    verdict: str
    shape: tuple[int, ...]
    element: str
    strides: tuple[int | str, ...] | None
    reasons: tuple[str, ...]
    file: str
    line: int


@dataclass(frozen=True)
class Report:
    """Everything found about one kernel on one target."""

    kernel: str
    target: str
    findings: tuple[Finding, ...]
    accesses: tuple[AccessReport, ...] = ()
    footprint: Footprint | None = None

    @property
    def legal(self) -> bool:
        """Whether nothing found is an abort or an error."""
        return not any(finding.severity in ("abort", "error") for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"legal": self.legal}


def check_kernel(specimen: Specimen, profile: Profile) -> Report:
    """Compile a specimen to TTIR and check it. A kernel that Triton refuses is a finding, not an exception.

    Raises:
        InvalidInputError, UnknownNameError: the signature does not fit the kernel.
        InvalidValueError: an impossible grid, num_warps or num_stages.
    """
    name = specimen.name or kernel_name(specimen.kernel)
    launch = specimen.launch
    try:
        text = ttir_of(specimen, profile)
    except KernelBuildError as error:
        if not is_kernel(specimen.kernel):
            raise
        return Report(name, profile.value("triton_arch"), (_finding(("compiles", None, str(error)), profile),))
    return check_ttir(text, profile, launch, name)


def ttir_of(specimen: Specimen, profile: Profile) -> str:
    """TTIR text of a specimen, with the target's default precision of an f32 dot.

    Raises:
        KernelBuildError: Triton is missing or refuses the kernel.
    """
    # Triton's own front end insists on a power of two; the rule `warps` has its say about the number asked for.
    warps = 1 << (specimen.num_warps.bit_length() - 1)
    return compile_ttir(
        specimen.kernel,
        specimen.signature,
        specimen.constexprs,
        num_warps=warps,
        num_stages=specimen.num_stages,
        dot_precision=profile.value("dot_precisions")[0],
    )


def check_ttir(ttir: str | Module, profile: Profile, launch: Launch | None = None, name: str = "") -> Report:
    """Check a kernel's TTIR.

    Args:
        ttir: text, or what `parse` made of it.
        profile: the target's facts.
        launch: how it is launched; None: one program of 4 warps.
        name: shown in the report; "": the kernel's own.

    Raises:
        InvalidInputError: text that is not TTIR.
    """
    launch = launch or Launch()
    function = (parse(ttir) if isinstance(ttir, str) else ttir).function
    accesses = [examine(op, profile) for op in function.walk() if op.name in ACCESSES]
    needs = footprint(function, accesses, launch, profile)
    breaches: list[Breach] = [
        *check_types(function, profile),
        *check_operations(function, profile),
        *check_accesses(accesses, profile),
        *check_patterns(function, accesses),
        *check_compute(function, launch, profile),
        *check_launch(launch, profile),
        *check_stages(function, launch, profile),
        *check_memory(function, needs, launch, profile),
    ]
    findings = {_finding(breach, profile) for breach in breaches}
    kept = sorted(
        (f for f in findings if f.severity),
        key=lambda f: (SEVERITIES.index(f.severity), f.file, f.line, f.rule, f.message),
    )
    reports = tuple(map(_access_report, accesses))
    return Report(name or function.name, profile.value("triton_arch"), tuple(kept), reports, needs)


def _finding(breach: Breach, profile: Profile) -> Finding:
    name, op, message = breach
    broken = rule(name)
    place: dict[str, Any] = {}
    if isinstance(op, Op):
        place = {"file": op.location.file, "line": op.location.line, "operation": op.name}
    severity = broken.severity_on(profile.value("triton_arch"))
    return Finding(name, severity, message, **place, remedy=broken.remedy, source=broken.source)


def _access_report(access: Access) -> AccessReport:
    at = access.op.location
    decisive = tuple(reason.rule for reason in access.reasons if RULES[reason.rule].severity != "note")
    return AccessReport(
        access.op.name, access.verdict, access.shape, access.element, access.strides, decisive, at.file, at.line
    )
