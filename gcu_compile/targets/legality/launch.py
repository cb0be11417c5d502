"""Checks of how a kernel is launched and of the memory that one program of it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gcu_compile.errors import InvalidValueError
from gcu_compile.targets.legality.addresses import GATHER, Access
from gcu_compile.targets.profile import Profile
from gcu_compile.targets.ttir import Function, Op, Value

# (rule id, operation or None, message): what every check yields.
Breach = tuple[str, Op | None, str]
# Operations that the compiler fuses: their results live in registers unless another kind of operation wants them.
ELEMENTWISE = (
    "arith.",
    "math.",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.fp_to_fp",
    "tt.bitcast",
    "tt.make_range",
    "tt.addptr",
    "tt.extern_elementwise",
    "tt.clampf",
    "tt.precise_",
    "tt.mulhiui",
)
LOOPS = ("scf.for", "scf.while")


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: programs in x, y, z; warps per program; pipeline stages of its loops."""

    grid: tuple[int, ...] = (1,)
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        if not 1 <= len(self.grid) <= 3 or not all(isinstance(n, int) and n > 0 for n in self.grid):
            raise InvalidValueError("grid", self.grid, "one to three positive numbers")
        for name in ("num_warps", "num_stages"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidValueError(name, getattr(self, name), "a positive number")

    @property
    def programs(self) -> int:
        """Programs in the whole grid."""
        count = 1
        for size in self.grid:
            count *= size
        return count


@dataclass(frozen=True)
class Footprint:
    """Bytes that one program needs at least: `l1` and `l1_pingpong` per SIP, `shared` for all its warps."""

    l1: int
    l1_pingpong: int
    shared: int


def check_launch(launch: Launch, profile: Profile) -> Iterator[Breach]:
    """Grid, warps and stages against the card's limits."""
    for axis, size, most in zip("xyz", launch.grid, profile.value("grid_max"), strict=False):
        if size > most:
            yield "grid", None, f"{size} programs in {axis}; at most {most}"
    most = profile.value("max_warps")
    if launch.num_warps & (launch.num_warps - 1) or launch.num_warps > most:
        yield "warps", None, f"num_warps {launch.num_warps}; a power of two, at most {most}"


def check_stages(function: Function, launch: Launch, profile: Profile) -> Iterator[Breach]:
    """Whether loops that feed a dot get their ping-pong buffers."""
    least, most = profile.value("pingpong_min_stages"), profile.value("pingpong_max_stages")
    if launch.num_stages > most:
        yield "stages", None, f"num_stages {launch.num_stages} is cut to {most}"
    elif launch.num_stages < least:
        for op in function.walk():
            if op.name == "tt.dot" and any(a.name == "scf.for" for a in op.ancestors()):
                yield "stages", op, f"num_stages {launch.num_stages}: this loop gets no ping-pong below {least}"


def check_memory(function: Function, footprint: Footprint, launch: Launch, profile: Profile) -> Iterator[Breach]:
    """The footprint against L1 and shared memory, and tile sizes against the DMA engine."""
    largest = profile.value("tile_dim_max")
    for op in function.walk():
        for value in op.results:
            if largest is not None and any(size > largest for size in value.type.shape):
                yield "tile-dim", op, f"a dimension of {max(value.type.shape)}; at most {largest}"
    usable = profile.value("l1_usable_bytes")
    if footprint.l1 > usable:
        yield "l1-bytes", None, f"at least {footprint.l1} bytes of L1 per SIP; {usable} are usable"
    elif footprint.l1_pingpong > usable:
        yield "l1-pingpong", None, f"{footprint.l1_pingpong} bytes of L1 per SIP with ping-pong; {usable} are usable"
    per_warp, per_block = profile.value("shared_bytes_per_warp"), profile.value("shared_bytes_per_block")
    limits = [per_block, None if per_warp is None else per_warp * launch.num_warps]
    fits = min((limit for limit in limits if limit is not None), default=footprint.shared)
    if footprint.shared > fits:
        yield "l2-bytes", None, f"{footprint.shared} bytes of dot operands are shared; {fits} fit"


def footprint(function: Function, accesses: list[Access], launch: Launch, profile: Profile) -> Footprint:
    """A lower bound of the memory of one program.

    Counted are results of loads, dots, reductions, scans and loops, and elementwise results that such an operation
    uses; other elementwise results are fused away. A tensor is spread evenly over the program's warps.
    """
    order = {op: at for at, op in enumerate(function.walk())}
    ends = {
        op: max((order[inner] for region in op.regions for inner in region.walk()), default=order[op]) + 1
        for op in order
        if op.name in LOOPS
    }
    spans: list[tuple[int, int, int]] = []
    pingpong: list[tuple[int, int, int]] = []
    for op, start in order.items():
        inside = [loop for loop in op.ancestors() if loop.name in LOOPS]
        for value in _held(op):
            size = value.type.count * value.type.bits // 8
            span = (start, _last_use(value, order, ends), size)
            spans.append(span)
            feeds_dot = op.name == "tt.load" and any(user.name == "tt.dot" for user in value.users)
            if feeds_dot and inside and launch.num_stages >= profile.value("pingpong_min_stages"):
                pingpong.append(span)
        if op.name in LOOPS:
            # A carried value passes from the loop's operand to its argument, to what is yielded, to its result.
            for value in (*(a for region in op.regions for a in region.arguments), *op.results):
                if value.type.is_tensor and not value.type.pointer:
                    begin = ends[op] if value.op is op else start
                    span = (begin, max(begin, _last_use(value, order, ends)), value.type.count * value.type.bits // 8)
                    spans.append(span)
    for access in accesses:
        if access.verdict == GATHER:
            # Offsets of 4 bytes and a mask of 1 byte per element stand in L1 beside the tile.
            count = access.op.operands[0].type.count
            spans.append((order[access.op], order[access.op] + 1, 5 * count))
    dots = [op for op in order if op.name == "tt.dot"] if launch.num_warps > 1 else []
    shared = max((sum(v.type.count * v.type.bits // 8 for v in op.operands[:2]) for op in dots), default=0)
    warps = launch.num_warps
    return Footprint(-(-_peak(spans) // warps), -(-_peak(spans + pingpong) // warps), shared)


def _held(op: Op) -> list[Value]:
    """Results of `op` that need memory of their own."""
    if op.name in ("arith.constant", "tt.splat", "tt.make_range", *LOOPS):
        return []
    tensors = [v for v in op.results if v.type.is_tensor and not v.type.pointer]
    if not op.name.startswith(ELEMENTWISE):
        return tensors
    accesses = ("tt.load", "tt.store", "tt.atomic_rmw", "tt.atomic_cas")
    # An access takes an address and a mask as a slice's bounds, not as tensors; a stored value streams out.
    return [v for v in tensors if any(not u.name.startswith((*ELEMENTWISE, *accesses)) for u in v.users)]


def _last_use(value: Value, order: dict[Op, int], ends: dict[Op, int]) -> int:
    """Where the value dies: a loop that uses one from outside keeps it to the loop's end."""
    maker = value.op if value.op is not None else value.owner.parent
    around = {*maker.ancestors(), *([maker] if value.op is None else [])}
    last = order[maker] + 1
    for user in value.users:
        last = max(last, order[user])
        last = max([last, *(ends[loop] for loop in user.ancestors() if loop in ends and loop not in around)])
    return last


def _peak(spans: list[tuple[int, int, int]]) -> int:
    """The largest sum of sizes alive at one point; a span holds its start and not its end."""
    changes = sorted([(start, size) for start, _, size in spans] + [(end, -size) for _, end, size in spans])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
