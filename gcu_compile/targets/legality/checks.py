"""Checks of what a kernel computes: types, operations, dots, reductions, known-wrong patterns."""

from __future__ import annotations

from collections.abc import Iterator

from gcu_compile.targets.legality.addresses import ACCESSES, Access, address_loads
from gcu_compile.targets.legality.affine import strides, uniform
from gcu_compile.targets.legality.launch import LOOPS, Breach, Launch
from gcu_compile.targets.profile import Profile
from gcu_compile.targets.ttir import Function, Op, Value
from gcu_compile.targets.ttir_types import attribute

WIDE = ("i64", "f64")
INDEX_OPS = frozenset(
    [
        "arith.extsi",
        "arith.extui",
        "arith.addi",
        "arith.subi",
        "arith.muli",
        "arith.cmpi",
        "arith.andi",
        "arith.constant",
        "arith.divsi",
        "arith.remsi",
        "tt.splat",
        "tt.broadcast",
        "tt.expand_dims",
        "tt.addptr",
        "arith.trunci",
    ]
)
# Block pointers and descriptors take their sizes and strides as i64; the compiler lowers those itself.
TILE_POINTERS = ("tt.make_tensor_ptr", "tt.make_tensor_descriptor")
CLAMPS = frozenset(
    ["arith.select", "arith.minsi", "arith.minui", "arith.maxsi", "arith.remsi", "arith.remui", "arith.andi"]
)
ATOMICS = {"fadd": "add", "umax": "max", "umin": "min"}
MINMAX = frozenset(
    f"arith.{name}" for name in ("maxsi", "minsi", "maxui", "minui", "maximumf", "minimumf", "maxnumf", "minnumf")
)


def check_types(function: Function, profile: Profile) -> Iterator[Breach]:
    """64-bit values, index arithmetic in i64, and element types that the card does not have."""
    for argument in function.arguments:
        yield from _element(argument, None, f"argument {argument.name.lstrip('%')}", profile)
    for op in function.walk():
        for value in op.results:
            if value.type.element in WIDE and not value.type.pointer:
                if value.users and all(user.name in TILE_POINTERS for user in value.users):
                    continue
                if value.type.element == "i64" and _only_index(value):
                    if op.name in ("arith.extsi", "arith.extui"):
                        yield "no-64-bit-index", op, f"{op.name} to {value.type.text} in index arithmetic"
                    continue
            yield from _element(value, op, op.name, profile)


def _element(value: Value, op: Op | None, what: str, profile: Profile) -> Iterator[Breach]:
    element = value.type.element
    if element in WIDE:
        yield "no-64-bit-values", op, f"{what} is {value.type.text}"
    elif element.startswith(("f", "i", "b", "tf")) and element != "index" and element not in profile.value("dtypes"):
        yield "dtype", op, f"{what} is {element}; this card has {', '.join(profile.value('dtypes'))}"


def _only_index(value: Value) -> bool:
    """Whether an i64 is never loaded or stored: it comes from, and goes to, index arithmetic."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.op is None or value.op.name not in INDEX_OPS:
            return False
        for user in value.users:
            if user.name in ACCESSES and value.type.pointer:
                continue
            if user.name not in INDEX_OPS and user.name not in TILE_POINTERS:
                return False
            todo += [v for v in user.results if v.type.element == "i64" and not v.type.pointer]
        todo += [v for v in value.op.operands if v.type.element == "i64" and not v.type.pointer]
    return True


def check_operations(function: Function, profile: Profile) -> Iterator[Breach]:
    """Operations without a lowering, atomics, and library functions."""
    for op in function.walk():
        if op.name in profile.value("refused_operations"):
            yield "unsupported-operation", op, f"{op.name} has no lowering"
        elif op.name.startswith("tt.atomic"):
            kind = "cas" if op.name == "tt.atomic_cas" else op.text.split()[1].rstrip(",")
            kind = ATOMICS.get(kind, kind)
            element = op.operands[0].type.element
            types = profile.value("atomics").get(kind, [])
            if element not in types:
                yield "atomics", op, f"atomic {kind} on {element}; this card has it on {', '.join(types) or 'nothing'}"
        elif op.name == "tt.extern_elementwise":
            symbol = (attribute(op.text, "symbol") or "").strip('"')
            if symbol in profile.value("aborting_externs") or not symbol.startswith("__nv_"):
                yield "extern-function", op, f"{symbol} is not usable"


def check_accesses(accesses: list[Access], profile: Profile) -> Iterator[Breach]:
    """What the verdicts on memory accesses mean, one breach per reason."""
    for access in accesses:
        for reason in access.reasons:
            where = f" (line {reason.op.location.line})" if reason.op.location != access.op.location else ""
            yield reason.rule, access.op, f"{access.op.name} of {_tile(access)}: {reason.text}{where}"
        if len(access.shape) > profile.value("dte_max_rank"):
            yield "dte-rank", access.op, f"a tile of rank {len(access.shape)}"
        if access.verdict == "scalar dma" and any(around.name in LOOPS for around in access.op.ancestors()):
            yield "scalar-access-in-loop", access.op, f"{access.op.name} of one {access.element} per iteration"
        for load in address_loads(access) if access.shape else ():
            if _masked_without_zero(load) and not _clamped(load.result, access.op.operands[0]):
                line = load.location.line
                yield "indirect-clamp", access.op, f"the index loaded in line {line} reaches the address unclamped"


def _tile(access: Access) -> str:
    return "x".join(map(str, (*access.shape, access.element)))


def _masked_without_zero(load: Op) -> bool:
    """Whether some elements of a load are whatever the memory or `other` holds, and not 0: no index at all."""
    return len(load.operands) > 1 and not (len(load.operands) > 2 and uniform(load.operands[2]) == 0)


def _clamped(loaded: Value, address: Value) -> bool:
    """Whether every path from a loaded index to an address passes an operation that bounds it."""
    seen, todo = set(), [loaded]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value is address:
            return False
        todo += [v for user in value.users if user.name not in CLAMPS | ACCESSES for v in user.results]
    return True


def check_patterns(function: Function, accesses: list[Access]) -> Iterator[Breach]:
    """Code that compiles and was measured to give wrong numbers."""
    loads = {access.op: access for access in accesses}
    for op in function.walk():
        if op.name == "tt.trans" and not op.result.type.pointer and _is_data(op.operands[0]):
            yield "transposed-tile", op, f"tl.trans of a {op.operands[0].type.text}"
        if op.name == "tt.reduce" and len(op.operands[0].type.shape) == 2:
            axis, shape = int(attribute(op.text, "axis")), op.operands[0].type.shape
            rows = shape[1 - axis]
            strided = [a for a in _sources(op.operands[0], loads) if (a.strides or (1, 1))[axis] not in (0, 1)]
            if rows in (1, 2) and shape[axis] > 1 and strided:
                line = strided[0].op.location.line
                yield "strided-reduction-block", op, f"{rows} rows of a reduction over a strided axis (line {line})"
    for access in accesses:
        tile = len(access.shape) == 2 and min(access.shape) > 1 and access.op.name == "tt.load"
        if tile and access.strides and access.strides[0] == 1 and access.strides[1] not in (0, 1):
            yield "transposed-tile", access.op, f"a load of {_tile(access)} that is contiguous along dimension 0"


def _is_data(value: Value) -> bool:
    """Whether a tensor is data, and not an index that addresses are made of."""
    return not (value.type.element == "i32" and strides(value) is not None)


def _sources(value: Value, loads: dict[Op, Access]) -> list[Access]:
    """Loads that a tensor is computed from, element by element."""
    seen, todo, found = set(), [value], []
    while todo:
        value = todo.pop()
        if value in seen or value.op is None:
            continue
        seen.add(value)
        if value.op in loads:
            found.append(loads[value.op])
        else:
            todo += [v for v in value.op.operands if v.type.shape == value.type.shape]
    return found


def check_compute(function: Function, launch: Launch, profile: Profile) -> Iterator[Breach]:
    """Dots, reductions and scans."""
    for op in function.walk():
        if op.name == "tt.dot":
            yield from _dot(op, launch, profile)
        elif op.name == "tt.reduce":
            yield from _reduce(op, profile)
        elif op.name == "tt.scan":
            axis, kind = int(attribute(op.text, "axis")), op.operands[0].type
            across = max((size for at, size in enumerate(kind.shape) if at != axis), default=1)
            vector = profile.value("vector_length_bytes") * 8 // max(kind.bits, 8)
            if across < vector:
                yield "scan-shape", op, f"a scan of {kind.text} along {axis}: {across} lanes; a vector has {vector}"


def _dot(op: Op, launch: Launch, profile: Profile) -> Iterator[Breach]:
    left, right, result = op.operands[0].type, op.operands[1].type, op.result.type
    pairs = profile.value("dot_pairs")
    if left.element != right.element:
        yield "dot-dtype", op, f"operands are {left.element} and {right.element}"
    elif left.element in profile.value("dtypes") and result.element not in pairs.get(left.element, []):
        known = "; ".join(f"{a} to {' or '.join(b)}" for a, b in pairs.items())
        yield "dot-dtype", op, f"{left.element} to {result.element}; this card has {known}"
    precision = attribute(op.text.replace("inputPrecision =", "precision =").split(" : ")[0], "precision") or "ieee"
    if left.element == "f32" and precision not in profile.value("dot_precisions"):
        yield "dot-precision", op, f"{precision}; this card has {', '.join(profile.value('dot_precisions'))}"
    rows, columns, depth = result.shape[-2], result.shape[-1], left.shape[-1]
    split = {8: (4, 2), 4: (2, 2), 2: (2, 1)}.get(launch.num_warps, (1, 1))
    share = (rows // split[0], columns // split[1])
    multiples = profile.value("dot_warp_multiple").get(left.element, [])
    if multiples and not any(
        share[0] and share[1] and not (share[0] % m[0] or share[1] % m[1] or (len(m) > 2 and depth % m[2]))
        for m in multiples
    ):
        wanted = " or ".join("x".join(map(str, m)) for m in multiples)
        yield "dot-shape", op, f"a warp's share of {rows}x{columns} is {share[0]}x{share[1]}; multiples of {wanted}"
    least = profile.value("dot_min_m")
    if least is not None and rows < least:
        yield "dot-shape", op, f"{rows} rows; a native dot has at least {least}"
    if launch.num_warps < profile.value("dot_min_warps"):
        yield "dot-warps", op, f"num_warps {launch.num_warps}; at least {profile.value('dot_min_warps')}"
    if left.element == "f16" and launch.num_warps >= 8:
        yield "dot-many-warps", op, f"num_warps {launch.num_warps}"


def _reduce(op: Op, profile: Profile) -> Iterator[Breach]:
    """Dimensions 1 and 2 of the card's builtin are those before and after the reduced one, or it and the last."""
    shape = op.operands[0].type.shape
    inner = [o.name for o in op.regions[0].ops]
    kind = "sum" if inner[0] in ("arith.addf", "arith.addi") else "min/max" if inner[0] in MINMAX else ""
    if not kind or len(inner) != 2:
        return
    wanted = profile.value("reduce_sum_multiple" if kind == "sum" else "reduce_minmax_multiple")
    dims = shape[-2:] if len(shape) > 1 else (1, shape[0])
    if any(size % multiple for size, multiple in zip(dims, wanted, strict=True)):
        yield "reduce-shape", op, f"a {kind} over {op.operands[0].type.text}; fast at multiples of {wanted}"
