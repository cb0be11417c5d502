"""How long would a launch take on the card, and what bounds it? A model, from a kernel's TTIR and the profile.

Five things are counted, each as if it ran alone: the launch; bytes over DRAM bandwidth; the DMA engine's work (a
setup per slice, a cost per contiguous run, a cost per gathered element); dot operations; elementwise operations.
The prediction is the launch plus the largest of the others, because the compiler overlaps them; the largest of all
five is the bound. Several rates are assumptions of the profile and can be overridden there once measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

from gcu_compile.errors import UnknownNameError
from gcu_compile.targets.legality.addresses import ACCESSES, ATOMIC, GATHER, SCALAR, Access, examine
from gcu_compile.targets.legality.affine import constant
from gcu_compile.targets.legality.launch import Launch
from gcu_compile.targets.profile import Profile
from gcu_compile.targets.ttir import Function, Module, Op, Value
from gcu_compile.targets.ttir_types import element_bits

BOUNDS = ("launch", "dram", "dma", "dot", "vector")
WRITES = ("tt.store", "tt.descriptor_store")
BINARY = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: int(a / b) if b else None,
    "arith.remsi": lambda a, b: a - b * int(a / b) if b else None,
    "arith.minsi": min,
    "arith.maxsi": max,
}
ELEMENTWISE = ("arith.", "math.", "tt.fp_to_fp", "tt.extern_elementwise", "tt.precise_")
AXES = {"x": 0, "y": 1, "z": 2}


@dataclass(frozen=True)
class Cost:
    """Work of all launches together, and the time of each kind of it.

    bytes_read, bytes_written: DRAM traffic in bytes, masked elements included. dot_operations: multiplications and
    additions. vector_operations: elementwise results, in f32 equivalents. slices, gathered: DMA slices and gathered
    elements. times: microseconds by bound. gathered_bytes: of the traffic, what was gathered. unknown_loops: source
    lines of loops counted once, because their length is not known from the constants and `values`.
    """

    bytes_read: int
    bytes_written: int
    dot_operations: int
    vector_operations: int
    slices: int
    gathered: int
    launches: int
    active_sips: int
    times: Mapping[str, float]
    gathered_bytes: int = 0
    unknown_loops: tuple[int, ...] = field(default=())

    @property
    def bound(self) -> str:
        """What takes longest: one of `BOUNDS`."""
        return max(BOUNDS, key=lambda name: self.times[name])

    @property
    def microseconds(self) -> float:
        """Predicted time of all launches."""
        return self.times["launch"] + max(self.times[name] for name in BOUNDS if name != "launch")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"bound": self.bound, "microseconds": self.microseconds}


def predict(
    module: Module,
    profile: Profile,
    launch: Launch | None = None,
    values: Mapping[str, int] | None = None,
    launches: int = 1,
) -> Cost:
    """Predict a kernel's time.

    Args:
        module: its TTIR, parsed.
        profile: the target's facts.
        launch: grid, warps and stages; None: one program of 4 warps.
        values: what integer arguments are, by name, for the length of loops.
        launches: how often it is launched.

    Raises:
        UnknownNameError: a value for an argument that the kernel does not have.
    """
    launch, values = launch or Launch(), dict(values or {})
    function = module.function
    names = [argument.name.lstrip("%") for argument in function.arguments]
    for name in values:
        if name not in names:
            raise UnknownNameError(f"argument of {function.name}", name, names)
    count = _Count(function, profile, launch, values)
    programs = launch.programs * launches
    sips = max(1, min(launch.programs * launch.num_warps, profile.value("sip_count")))
    share = sips / profile.value("sip_count")
    read, written = round(count.read * programs), round(count.written * programs)
    dma_us = (
        count.slices * profile.value("dma_setup_cost")
        + count.runs * profile.value("dma_row_cost") / 1e3
        + count.gathered * profile.value("gather_element_cost") / 1e3
    )
    rates = profile.value("dot_rate")
    slowest = min(rates.values())
    dot_us = sum(work / (rates.get(kind, slowest) * 1e6) for kind, work in count.dots.items())
    times = {
        "launch": float(launches * profile.value("launch_cost")),
        "dram": (read + written) / (profile.value("dram_bandwidth") * 1e3),
        "dma": dma_us * programs / sips,
        "dot": dot_us * programs / share,
        "vector": count.vector * programs / (profile.value("vector_rate") * 1e3) / share,
    }
    return Cost(
        read,
        written,
        round(sum(count.dots.values()) * programs),
        round(count.vector * programs),
        round(count.slices * programs),
        round(count.gathered * programs),
        launches,
        sips,
        times,
        round(count.gathered_bytes * programs),
        tuple(sorted(count.unknown)),
    )


class _Count:
    """Work of one program, loops multiplied out."""

    def __init__(self, function: Function, profile: Profile, launch: Launch, values: Mapping[str, int]):
        self.function, self.profile, self.launch, self.values = function, profile, launch, values
        self.read = self.written = self.slices = self.runs = self.gathered = self.gathered_bytes = 0
        self.vector = 0.0
        self.dots: dict[str, int | Fraction] = {}
        self.unknown: set[int] = set()
        self.trips: dict[Op, int | Fraction] = {}
        for op in function.walk():
            if any(around.name in ("tt.reduce", "tt.scan") for around in op.ancestors()):
                continue
            times: int | Fraction = 1
            for around in op.ancestors():
                times *= self.trip_count(around)
            self.add(op, times)

    def add(self, op: Op, times: int | Fraction) -> None:
        if op.name in ACCESSES:
            self.access(examine(op, self.profile), times)
        elif op.name == "tt.dot":
            left, result = op.operands[0].type, op.result.type
            self.dots[left.element] = self.dots.get(left.element, 0) + 2 * result.count * left.shape[-1] * times
        elif op.name in ("tt.reduce", "tt.scan"):
            self.vector += sum(_lanes(value) for value in op.operands) * times
        elif _computes(op):
            self.vector += _lanes(op.result) * times

    def access(self, access: Access, times: int | Fraction) -> None:
        kept = [1 if s == 0 else n for n, s in zip(access.shape, access.strides or access.shape, strict=True)]
        elements = 1
        for size in kept:
            elements *= size
        moved = elements * max(1, element_bits(access.element) // 8) * times
        if access.op.name in WRITES or access.verdict == ATOMIC:
            self.written += moved
        if access.op.name not in WRITES:
            self.read += moved
        if access.verdict in (GATHER, ATOMIC) or access.verdict == "abort":
            self.gathered += elements * times
            self.gathered_bytes += moved
            return
        self.slices += times
        run = elements if access.verdict == SCALAR else self.run(access)
        self.runs += -(-elements // run) * times

    @staticmethod
    def run(access: Access) -> int:
        """Contiguous elements: all of a row, or the innermost dimension of a block pointer's tile."""
        return access.run if access.strides is not None else access.shape[-1]

    def trip_count(self, loop: Op) -> int | Fraction:
        """Iterations of a loop in program 0; 1 for what is no loop or has no known length.

        A grid-stride loop, from the program's number in steps of the number of programs, counts as the average of all.
        """
        if loop.name == "scf.while":
            self.unknown.add(loop.location.line)
        if loop.name != "scf.for":
            return 1
        if loop not in self.trips:
            low, high, step = (self.number(value) for value in loop.operands[:3])
            known = None not in (low, high, step) and step
            if not known:
                self.unknown.add(loop.location.line)
            if known and _grid_stride(loop):
                self.trips[loop] = max(Fraction(0), Fraction(high, step))
            else:
                self.trips[loop] = max(0, -(-(high - low) // step)) if known else 1
        return self.trips[loop]

    def number(self, value: Value) -> int | None:
        """An integer scalar, evaluated for program 0; None if it depends on what is not known."""
        op = value.op
        if op is None:
            named = value.owner is self.function
            return self.values.get(value.name.lstrip("%")) if named else None
        if op.name == "arith.constant":
            number = constant(op)
            return number if isinstance(number, int) else None
        if op.name == "tt.get_program_id":
            return 0
        if op.name == "tt.get_num_programs":
            axis = AXES[op.text.split()[1]]
            return self.launch.grid[axis] if axis < len(self.launch.grid) else 1
        if op.name in ("arith.extsi", "arith.extui", "arith.trunci"):
            return self.number(op.operands[0])
        if op.name in BINARY:
            left, right = (self.number(operand) for operand in op.operands)
            return None if left is None or right is None else BINARY[op.name](left, right)
        return None


def _grid_stride(loop: Op) -> bool:
    start, step = loop.operands[0].op, loop.operands[2].op
    return bool(start and step) and (start.name, step.name) == ("tt.get_program_id", "tt.get_num_programs")


def _lanes(value: Value) -> float:
    """Elements of a tensor in f32 equivalents; 0 for a scalar, which the scalar unit computes."""
    return value.type.count * max(value.type.bits, 8) / 32 if value.type.is_tensor else 0.0


def _computes(op: Op) -> bool:
    """Whether vector units compute the result: elementwise, and not only an address."""
    elementwise = op.name.startswith(ELEMENTWISE) and op.name != "arith.constant"
    return bool(elementwise and op.results and not _addresses_only(op.result))


def _addresses_only(value: Value) -> bool:
    """Whether a value ends in addresses and masks only, which cost no vector work."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        for user in value.users:
            if user.name in WRITES and value in user.operands[1:2]:
                return False
            if user.name in ACCESSES:
                continue
            if value.type.element not in ("i1", "i32", "i64") and not value.type.pointer:
                return False
            if not user.results or user.name in ("tt.reduce", "tt.scan", "tt.dot"):
                return False
            todo += user.results
    return True
