"""Which dimensions of a loop nest become a tile, and which a program walks one by one.

A kernel's iteration space is a chain of dimensions, outermost first. A tile spans up to three of them for a
pointwise kernel, one output and one reduced dimension for a reduction; all others are scalars: the division and
remainder that recover them are scalar arithmetic, and an index that is loaded at a scalar position leaves the address
a slice. The rules of `targets/legality` decide what may be tiled:

- no dimension on which a loaded index depends (the access would be a gather);
- no two dimensions along which an access runs the wrong way round (a transposed tile);
- strides of one access divide each other, and one of them at most is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from gcu_compile.targets.profile import Profile

# Elements of a tile: what FlagGems takes on gcu300 for 32-bit elements.
TILE = 32768
# Below this a tile is not split further to occupy more SIPs: a slice would be shorter than its setup is worth.
SMALLEST_TILE = 1024
LONGEST_PERSISTENT = 32768
WARPS, FEW_WARPS = 4, 1


@dataclass(frozen=True)
class Pattern:
    """One access as the chain sees it: elements per step of each dimension, None where it is not affine.

    index: dimensions on which an index depends that is computed or loaded here to address something else.
    compared: dimensions of a position that is compared to make a mask: one of them at most may be tiled.
    """

    strides: tuple[int | None, ...]
    store: bool = False
    index: frozenset[int] = field(default=frozenset())
    compared: frozenset[int] = field(default=frozenset())


@dataclass(frozen=True)
class Tree:
    """One tiled dimension of a kernel: positions in the chain, outermost first, and the block of the innermost.

    block 1: all positions are walked as scalars.
    """

    dims: tuple[int, ...]
    block: int


@dataclass(frozen=True)
class Tiling:
    """Trees by Inductor's prefix (z, y, x, r0_), warps per program, programs in the grid."""

    trees: dict[str, Tree]
    num_warps: int
    programs: int
    persistent: bool = False


def pow2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, int(number) - 1).bit_length()


def pointwise(sizes: Sequence[int], patterns: Sequence[Pattern], profile: Profile) -> Tiling:
    """Tiling of a pointwise kernel over `sizes`, outermost first."""
    count = len(sizes)
    innermost = count - 1
    tiled = [d for d in range(max(0, count - 3), count) if sizes[d] > 1 or d == innermost]
    walked = {d for pattern in patterns for d in pattern.index}
    tiled = [d for d in tiled if d == innermost or d not in walked]
    tiled = _settle(tiled, innermost, sizes, patterns)
    most, room, blocks = profile.value("inductor_block_max"), TILE, {}
    for name, dim in zip("XYZ", reversed(tiled), strict=False):
        blocks[dim] = min(pow2(sizes[dim]), most[name], room)
        room //= blocks[dim]
    if sizes[innermost] == 1:
        blocks[innermost] = 1
    warps = WARPS if prod(blocks.values()) >= 2 * SMALLEST_TILE else FEW_WARPS
    _spread(blocks, sorted(blocks), sizes, warps, prod(n for d, n in enumerate(sizes) if d not in blocks), profile)
    warps = warps if prod(blocks.values()) >= SMALLEST_TILE else FEW_WARPS
    trees = {
        "z": tuple(range(0, count - 2)),
        "y": (count - 2,) if count > 1 else (),
        "x": (innermost,),
    }
    kept = {p: Tree(dims, blocks.get(dims[-1], 1)) for p, dims in trees.items() if dims}
    return Tiling(kept, warps, _programs(kept, sizes, warps, profile))


def reduction(
    outer: Sequence[int], reduced: Sequence[int], patterns: Sequence[Pattern], profile: Profile, fixed: bool = True
) -> Tiling:
    """Tiling of a reduction: `outer` dimensions are kept, `reduced` ones summed up; patterns span both.

    Args:
        fixed: the reduced sizes are the same at every launch; what changes cannot be held in one block.
    """
    sizes = [*outer, *reduced]
    count, x, r = len(outer), len(outer) - 1, len(sizes) - 1
    walked = {d for pattern in patterns for d in pattern.index}
    against = any(_crossed(p.strides, x, r, sizes) for p in patterns)
    most = profile.value("inductor_block_max")
    blocks: dict[int, int] = {}
    persistent = fixed and not against and len(reduced) == 1 and sizes[r] <= LONGEST_PERSISTENT
    if against:
        # The reduced axis is not contiguous: add rows up, one at a time, in a tile of outputs.
        blocks[r] = 1
    elif persistent:
        blocks[r] = min(pow2(sizes[r]), most["R0_"])
    else:
        blocks[r] = min(pow2(sizes[r] if fixed else max(sizes[r], SMALLEST_TILE)), most["X"])
    tiled = [x, r] if blocks[r] > 1 else [x]
    fits = x not in walked and not any({x, r} <= p.compared for p in patterns)
    fits = fits and all(_tileable(p.strides, tiled, sizes) for p in patterns)
    blocks[x] = min(pow2(sizes[x]), most["X"], max(1, TILE // blocks[r])) if fits or against else 1
    warps = WARPS if blocks[x] * blocks[r] >= 2 * SMALLEST_TILE else FEW_WARPS
    _spread(blocks, (x,), sizes, warps, prod(outer[:-1]), profile)
    warps = warps if blocks[x] * blocks[r] >= SMALLEST_TILE else FEW_WARPS
    trees = {"x": Tree(tuple(range(count)), blocks[x]), "r0_": Tree(tuple(range(count, len(sizes))), blocks[r])}
    return Tiling(trees, warps, _programs({"x": trees["x"]}, sizes, warps, profile), persistent)


def _settle(tiled: list[int], innermost: int, sizes: Sequence[int], patterns: Sequence[Pattern]) -> list[int]:
    """Give up dimensions of the tile, outermost first, until every access fits it."""
    tiled = [
        d for d in tiled if d == innermost or not any(_crossed(p.strides, d, innermost, sizes) for p in patterns)
    ]
    for dim in list(tiled):
        if dim != innermost and any(dim in p.compared and len(p.compared & set(tiled)) > 1 for p in patterns):
            tiled.remove(dim)
    for dim in list(tiled):
        if dim != innermost and not all(_tileable(p.strides, tiled, sizes) for p in patterns):
            tiled.remove(dim)
    return tiled


def _crossed(strides: Sequence[int | None], outer: int, inner: int, sizes: Sequence[int]) -> bool:
    """Whether a tile of both dimensions would be transposed: contiguous along the outer one only."""
    if sizes[outer] == 1 or sizes[inner] == 1:
        return False
    return strides[outer] == 1 and strides[inner] not in (0, 1)


def _tileable(strides: Sequence[int | None], dims: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether one slice can have these dimensions: affine, one unit stride, strides that divide each other."""
    found = [strides[d] for d in dims if sizes[d] > 1]
    if any(stride is None for stride in found):
        # Not affine in a tiled dimension: a gather whatever the others are.
        return True
    static = sorted(abs(stride) for stride in found if stride)
    if sum(stride == 1 for stride in static) > 1:
        return False
    return not any(large % small for small, large in zip(static, static[1:], strict=False))


def _spread(
    blocks: dict[int, int], dims: Sequence[int], sizes: Sequence[int], warps: int, rest: int, profile: Profile
) -> None:
    """Halve the blocks of `dims`, in that order, until there is a tile for every program.

    rest: tiles that the walked dimensions make. No tile falls below `SMALLEST_TILE`.
    """
    wanted = profile.value("sip_count") // warps
    for dim in dims:
        while rest * prod(-(-sizes[d] // blocks[d]) for d in dims) < wanted:
            if blocks[dim] == 1 or prod(blocks.values()) <= SMALLEST_TILE:
                break
            blocks[dim] //= 2


def _programs(trees: dict[str, Tree], sizes: Sequence[int], warps: int, profile: Profile) -> int:
    """One program per group of `warps` SIPs, or fewer if there is less to do."""
    tiles = prod(
        prod(sizes[d] for d in tree.dims[:-1]) * -(-sizes[tree.dims[-1]] // tree.block) for tree in trees.values()
    )
    return max(1, min(tiles, profile.value("sip_count") // warps))
