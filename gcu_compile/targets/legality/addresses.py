"""What the GCU compiler makes of one memory access: a DMA slice, a gather, or an abort of the process.

The lists are those of flagos-ai/FlagTree `triton_gcu300/lib/Analysis/PtrAnalysis.cpp`, read at 7915eb9c. That
analysis walks from the pointer (and then from the mask) back through the operations that computed it. Operations
on scalars are never looked at. A gather is correct but moves one element at a time; an abort kills the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gcu_compile.targets.legality.affine import Stride, strides, uniform
from gcu_compile.targets.profile import Profile
from gcu_compile.targets.ttir import Op, Value

SLICE, SCALAR, GATHER, ABORT, ATOMIC = "dma slice", "scalar dma", "gather", "abort", "atomic"
ADDRESS_SLICE = frozenset(
    [
        "arith.constant",
        "tt.make_range",
        "tt.addptr",
        "tt.splat",
        "tt.expand_dims",
        "tt.bitcast",
        "arith.bitcast",
        "tt.broadcast",
        "tt.trans",
        "arith.addi",
        "arith.muli",
        "arith.cmpi",
        "arith.ori",
        "arith.extsi",
        "arith.extui",
    ]
)
ADDRESS_GATHER = frozenset(
    [
        "tt.load",
        "arith.select",
        "arith.divsi",
        "arith.subi",
        "arith.remsi",
        "arith.remui",
        "arith.minsi",
        "arith.xori",
        "arith.fptosi",
        "arith.fptoui",
        "tt.dot",
        "tt.reduce",
        "tt.scan",
        "tt.histogram",
        "tt.cat",
        "tt.reshape",
        "ttg.convert_layout",
        "tt.int_to_ptr",
        "scf.for",
        "scf.if",
        "scf.while",
    ]
)
MASK_SLICE = frozenset(
    [
        "arith.constant",
        "tt.make_range",
        "tt.expand_dims",
        "tt.bitcast",
        "arith.bitcast",
        "tt.broadcast",
        "tt.splat",
        "arith.addi",
        "arith.andi",
        "arith.extsi",
        "arith.extui",
        "arith.cmpi",
    ]
)
MASK_ABORT = frozenset(
    [
        "arith.ori",
        "arith.minsi",
        "arith.minui",
        "arith.maxsi",
        "arith.maxui",
        "arith.shli",
        "arith.shrsi",
        "arith.shrui",
    ]
)
MASK_COMPARISONS = frozenset(("slt", "ult", "sge", "uge", "sgt", "ugt"))
# What Triton 3.3 toolchains (flagtree triton_v3.3.x) abort on or gather beyond the lists above.
OLD_ABORT = frozenset(("arith.minsi", "arith.xori", "tt.scan"))
OLD_COMPARISONS = frozenset(("sgt", "ugt"))
ACCESSES = frozenset(
    ("tt.load", "tt.store", "tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_load", "tt.descriptor_store")
)
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Reason:
    """Why an access is no slice: the rule, the operation that decides, and what is wrong with it."""

    rule: str
    op: Op
    text: str
    verdict: str = GATHER


@dataclass
class Access:
    """One load, store or atomic. `strides`: elements per step of each dimension, None where not affine."""

    op: Op
    verdict: str
    shape: tuple[int, ...]
    element: str
    strides: tuple[Stride, ...] | None = None
    reasons: list[Reason] = field(default_factory=list)

    @property
    def run(self) -> int:
        """Elements per contiguous run: the size of the dimension of stride 1, else 1."""
        pairs = zip(self.shape, self.strides or (), strict=False)
        return max((size for size, stride in pairs if stride == 1), default=1)


def examine(op: Op, profile: Profile) -> Access:
    """The verdict on a `tt.load`, `tt.store` or atomic, with every reason found."""
    pointer = op.operands[0]
    kind = pointer.type
    access = Access(op, SLICE, kind.shape, kind.element)
    if op.name.startswith("tt.atomic"):
        access.verdict = ATOMIC
        return access
    if kind.block:
        return access
    if not kind.is_tensor:
        access.verdict = SCALAR
        return access
    access.strides = strides(pointer)
    access.reasons = _Chain(op, mask=False).walk(pointer)
    access.reasons += _shape_reasons(access, profile)
    if not any(r.verdict in (GATHER, ABORT) for r in access.reasons):
        access.reasons += _mask_reasons(op)
    verdicts = {reason.verdict for reason in access.reasons}
    access.verdict = next((v for v in (ABORT, GATHER) if v in verdicts), SLICE)
    return access


class _Chain:
    """One walk from a pointer or a mask to what it is made of."""

    def __init__(self, access: Op, mask: bool):
        self.access, self.mask = access, mask
        self.seen: set[Value] = set()
        self.found: list[Reason] = []

    def walk(self, value: Value) -> list[Reason]:
        self.visit(value)
        return self.found

    def add(self, rule: str, op: Op, text: str, verdict: str = GATHER) -> None:
        self.found.append(Reason(rule, op, text, verdict))

    def visit(self, value: Value) -> None:
        if value in self.seen:
            return
        self.seen.add(value)
        if not value.type.is_tensor and not value.type.pointer:
            return
        if value.op is None:
            self.carried(value)
        elif not value.type.is_tensor:
            # Scalar address arithmetic always passes; only where the pointer comes from matters.
            if value.op.name == "tt.addptr":
                self.visit(value.op.operands[0])
        elif self.mask:
            self.mask_op(value.op)
        else:
            self.address_op(value.op)

    def carried(self, value: Value) -> None:
        loop = value.owner.parent if value.owner is not None else None
        if loop is None:
            return
        if loop.name != "scf.for":
            self.add("address-loop-carried", loop, f"{value.name} is carried by {loop.name}, not by a for loop")
            return
        start = loop.operands[3 + value.index - 1]
        if start.op is None and start.owner is not None and start.owner.parent is None:
            self.add("address-loop-carried", loop, f"{value.name} starts as the bare argument {start.name}")
            return
        self.visit(start)
        self.visit(loop.regions[0].terminator.operands[value.index - 1])

    def address_op(self, op: Op) -> None:
        if op.name in OLD_ABORT:
            self.add("toolchain-3.3", op, f"{op.name} in an address aborts Triton 3.3 toolchains", "note")
        if op.name in ADDRESS_GATHER:
            self.add("address-gather", op, f"the address goes through {op.name} on a tensor")
        elif op.name not in ADDRESS_SLICE:
            self.add("address-abort", op, f"the address goes through {op.name} on a tensor", ABORT)
        else:
            for operand in op.operands:
                self.visit(operand)

    def mask_op(self, op: Op) -> None:
        predicate = op.text.split()[1].rstrip(",") if op.name == "arith.cmpi" else ""
        if op.name in MASK_ABORT:
            self.add("mask-abort", op, f"the mask goes through {op.name} on a tensor", ABORT)
        elif op.name not in MASK_SLICE:
            self.add("mask-gather", op, f"the mask goes through {op.name} on a tensor")
        elif predicate and predicate not in MASK_COMPARISONS:
            self.add("mask-gather", op, f"the mask compares with {predicate}")
        elif predicate and sum(size > 1 for size in op.result.type.shape) > 1:
            self.add("mask-full-compare", op, f"the mask compares whole {_shape(op.result)} tensors")
        else:
            if predicate in OLD_COMPARISONS:
                self.add("toolchain-3.3", op, f"a mask with {predicate} is a gather on Triton 3.3 toolchains", "note")
            for operand in op.operands:
                self.visit(operand)


def _shape(value: Value) -> str:
    return "x".join(map(str, value.type.shape))


def _mask_reasons(op: Op) -> list[Reason]:
    """Reasons in the mask, and in what stands in for masked elements of a load."""
    at = 1 if op.name == "tt.load" else 2
    if len(op.operands) <= at:
        return []
    found = _Chain(op, mask=True).walk(op.operands[at])
    if op.name == "tt.load" and len(op.operands) > 2 and uniform(op.operands[2]) is None:
        found.append(Reason("mask-other", op, "`other` is a tensor of its own, not one value for all elements"))
    return found


def _shape_reasons(access: Access, profile: Profile) -> list[Reason]:
    """What the tile's rank and strides say against one slice."""
    found: list[Reason] = []

    def add(rule: str, text: str, verdict: str = GATHER) -> None:
        found.append(Reason(rule, access.op, text, verdict))

    rank, most = len(access.shape), profile.value("slice_max_rank")
    if rank > most:
        add("slice-rank", f"a tile of rank {rank}; a slice has at most {most}")
    if all(size == 1 for size in access.shape):
        add("slice-all-ones", f"a tile of shape {access.shape} holds one element")
    elif any(size == 1 for size in access.shape[:-1]):
        add("toolchain-3.3", f"a size-1 dimension in {access.shape} is a gather on Triton 3.3 toolchains", "note")
    if access.strides is None:
        if all(reason.verdict == "note" for reason in access.reasons):
            add("slice-continual", "the address is not a sum of one stride per dimension")
        return found
    pairs = [(size, stride) for size, stride in zip(access.shape, access.strides, strict=True) if size > 1]
    static = sorted({abs(stride) for _, stride in pairs if isinstance(stride, int) and stride})
    if any(stride > INT32_MAX for stride in static):
        add("slice-strides", f"a stride of {static[-1]} does not fit 32 bits")
    if any(large % small for small, large in zip(static, static[1:], strict=False)):
        add("slice-strides", f"the strides {static} do not divide each other")
    units = sum(stride == 1 for _, stride in pairs)
    if units > 1:
        add("slice-unit-stride", f"{units} dimensions have stride 1")
    if rank == 4 and not units:
        add("slice-rank-4", "a tile of rank 4 has no dimension of stride 1")
    dynamic = [stride for _, stride in pairs if isinstance(stride, str)]
    if dynamic:
        add("dynamic-stride", f"run-time stride {', '.join(dynamic)} must not be 0", "note")
    return found


def address_loads(access: Access) -> list[Op]:
    """Loads whose values the address is made of: an indirect access has at least one."""
    seen, todo, loads = set(), [access.op.operands[0]], []
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.op is None:
            continue
        if value.op.name == "tt.load":
            loads.append(value.op)
        todo += value.op.operands
    return loads
