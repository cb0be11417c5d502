"""Recovers how a matrix in the graph is dequantised: W[k, n] = (code - zero) * scale.

    mul( cast/view( sub( codes(weight), zeros ) ), scales )   anywhere under views and casts

The two operations of the affine part are found by walking; what lies under them is found by running it
(`lowering/probe.py`): codes must equal `layouts.unpack` of the weight in some layout, and the elements of scales
and zeros must lie where a group of neighbouring inputs, or a `g_idx`, puts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gcu_compile.kernels.dequant_gemm import eager, layouts
from gcu_compile.kernels.tolerance import TABLE
from gcu_compile.lowering import probe
from gcu_compile.lowering.rule import Refusal, value_of
from gcu_compile.torch_private import without_modes

aten, prims = torch.ops.aten, torch.ops.prims
INTEGERS = (torch.int8, torch.uint8, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
READ = (*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32)  # scales and zeros, by the operation
KEPT_STRUCTURES = 4096  # of pieces that were probed before
_known: dict[str, tuple | Refusal] = {}


@dataclass(frozen=True)
class Operand:
    """One of scales and zeros: node `source`, whose element for group g and output n is number
    `group_step * g + n_step * n`; `casts` are applied to it first: those that the operation does not make itself."""

    source: torch.fx.Node
    groups: int
    group_step: int
    n_step: int
    casts: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Weight:
    """Arguments of `gcu::dequant_gemm` that stand for a matrix [K, N] of the graph."""

    node: torch.fx.Node
    layout: str
    scales: Operand
    zeros: Operand | None
    zero_offset: int  # what is added to the zeros, to bring them into the codes' range
    g_idx: torch.fx.Node | None


def recover(matrix: torch.fx.Node) -> Weight | Refusal | None:
    """`matrix` [K, N] as a dequantised weight; a `Refusal` where it is one that no layout describes; None where it
    is none at all."""
    product = _peel(matrix)
    if product.target not in (aten.mul.Tensor,):
        return None
    try:
        nodes = probe.piece(matrix)
    except probe.NotSafe:
        return None
    inputs = list(probe.leaves(nodes))
    tensors = [node for node in inputs if isinstance(value_of(node), torch.Tensor)]
    if not any(value_of(node).dtype in INTEGERS for node in tensors):
        return None
    if len(tensors) < len(inputs) or not probe.has_numbers_for_sizes(nodes):
        return Refusal("the weight has a symbolic size")
    found = [node for node in inputs if _holds(node, *value_of(matrix).shape)]
    if len(found) != 1:
        return Refusal(f"{len(found)} inputs have the size of a weight in a known layout", near=True)
    key = probe.fingerprint(matrix, nodes)
    if key not in _known:
        if len(_known) >= KEPT_STRUCTURES:
            _known.clear()
        with without_modes():
            result = _examine(matrix, product, found[0], inputs)
        _known[key] = _in_numbers(result, nodes)
    return _in_nodes(_known[key], nodes)


def _in_numbers(result, nodes):
    """The same with nodes replaced by their place in the piece, so that it serves every piece alike."""
    place = {node: i for i, node in enumerate(nodes)}
    return result if isinstance(result, Refusal) else _map(result, place.get)


def _in_nodes(result, nodes):
    return result if isinstance(result, Refusal) else _map(result, lambda i: None if i is None else nodes[i])


def _map(weight: Weight, to) -> Weight:
    def operand(o):
        return o and Operand(to(o.source), o.groups, o.group_step, o.n_step, o.casts)

    g_idx = None if weight.g_idx is None else to(weight.g_idx)
    scales, zeros = operand(weight.scales), operand(weight.zeros)
    return Weight(to(weight.node), weight.layout, scales, zeros, weight.zero_offset, g_idx)


def _holds(node: torch.fx.Node, k: int, n: int) -> bool:
    """Whether an input is the stored tensor of [n, k] codes in some layout."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and bool(_layouts_of(value.shape, value.dtype, k, n))


def _layouts_of(shape, dtype, k: int, n: int) -> list[layouts.Layout]:
    return [form for form in layouts.LAYOUTS.values() if (form.shape(n, k), form.word) == (tuple(shape), dtype)]


def _peel(node: torch.fx.Node) -> torch.fx.Node:
    while node.target in probe.MOVES | probe.CASTS:
        node = node.args[0]
    return node


def _depends(node, on) -> bool:
    return isinstance(node, torch.fx.Node) and on in probe.piece(node)


def _examine(matrix, product, weight, inputs) -> Weight | Refusal:
    sides = [side for side in product.args if _depends(side, weight)]
    if len(sides) != 1:
        return Refusal("codes and scales are not the two sides of a product", near=True)
    scale = next((side for side in product.args if side is not sides[0]), None)
    if not isinstance(scale, torch.fx.Node):
        return Refusal("the scale is a number of the graph, not a tensor", near=True)
    difference, zero = _peel(sides[0]), None
    codes = sides[0]
    if difference.target in (aten.sub.Tensor, aten.add.Tensor, aten.sub.Scalar, aten.add.Scalar):
        left, right = difference.args[:2]
        if _depends(left, weight) and isinstance(right, torch.fx.Node) and difference.target == aten.sub.Tensor:
            codes, zero = left, right
            if difference.kwargs:
                return Refusal("zeros are multiplied as they are subtracted", near=True)
    unit = max(TABLE[value_of(node).dtype].unit for node in (product, matrix) if value_of(node).dtype in TABLE)
    if unit > TABLE[value_of(matrix).dtype].unit:
        return Refusal(f"the weight is rounded to {value_of(product).dtype} for a wider product", near=True)
    k, n = value_of(matrix).shape
    found = _layout(matrix, weight, codes, scale, zero)
    if found is None:
        return Refusal("the codes lie in no known layout, or are not centred on its midpoint", near=True)
    layout, offset = found
    index = [node for node in inputs if node is not weight and _may_index(node, k)]
    one = torch.ones(value_of(sides[0]).shape, dtype=torch.float64)
    parts = [_operand(matrix, scale, {sides[0]: one}, index)]
    if isinstance(zero, torch.fx.Node):
        nothing = torch.zeros(value_of(codes).shape, dtype=torch.float64)
        unit_scale = torch.full(value_of(scale).shape, -1.0, dtype=torch.float64)  # the zeros are subtracted
        parts.append(_operand(matrix, zero, {codes: nothing, scale: unit_scale}, index, integers=True))
    for part in parts:
        if isinstance(part, Refusal):
            return part
    used = {g for _, g in parts if g is not None}
    if len(used) > 1:
        return Refusal("scales and zeros are indexed differently", near=True)
    scales, zeros = parts[0][0], parts[1][0] if len(parts) == 2 else None
    result = Weight(weight, layout.name, scales, zeros, offset, next(iter(used), None))
    if zeros is not None and zeros.groups not in (1, scales.groups):
        return Refusal(f"{scales.groups} groups of scales, {zeros.groups} of zeros", near=True)
    if not _equal(matrix, result, index):
        return Refusal("the arithmetic is not (code - zero) * scale", near=True)
    return result


def _random(node: torch.fx.Node, seed: int = 0) -> torch.Tensor:
    """Random contents: every bit of integers, floats around 1."""
    value, g = value_of(node), torch.Generator().manual_seed(seed)
    if value.dtype.is_floating_point:
        return (torch.rand(value.shape, generator=g) + 0.5).to(value.dtype)
    info = torch.iinfo(value.dtype)
    return torch.randint(info.min, info.max, value.shape, generator=g, dtype=value.dtype)


def _blank(node, value: float) -> torch.Tensor:
    like = value_of(node)
    return torch.full(like.shape, value, dtype=like.dtype)


def _layout(matrix, weight, codes, scale, zero) -> tuple[layouts.Layout, int] | None:
    """The layout in which the stored words give the graph's codes, zeros taken as 0 and scales as 1; and what the
    graph has subtracted from the codes before it subtracts the zeros."""
    k, n = value_of(matrix).shape
    words = _random(weight)
    given = {weight: words, scale: _blank(scale, 1)}
    if isinstance(zero, torch.fx.Node):
        given[zero] = _blank(zero, 0)
    try:
        found = probe.run(matrix, given).float()
    except KeyError:
        return None
    for form in _layouts_of(words.shape, words.dtype, k, n):
        meant = layouts.unpack(words, form, n, k).T.float()
        for offset in (form.midpoint, 0):
            # Without a tensor of zeros the midpoint must have been subtracted.
            if (offset == form.midpoint or isinstance(zero, torch.fx.Node)) and torch.equal(found, meant - offset):
                return form, offset
    return None


def _may_index(node, k: int) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64) and value.shape == (k,)


def _operand(matrix, top, around, index, integers=False) -> tuple[Operand, torch.fx.Node | None] | Refusal:
    """Where in its source the element of `top` for (k, n) lies. `around`: values of the rest of the arithmetic with
    which the matrix is `top`, moved. `integers`: the operation takes them as they are."""
    k, n = value_of(matrix).shape
    source, casts = top, []
    while source.target in probe.MOVES | probe.CASTS:
        if source.target in probe.CASTS:
            casts.append(value_of(source).dtype)
        source = source.args[0]
    count = value_of(source).numel()
    if count == 0 or (count % n and count != 1):
        return Refusal(f"{count} scales or zeros do not make groups of {n} outputs", near=True)
    groups = max(1, count // n)
    g = torch.Generator().manual_seed(1)
    given = {node: torch.randint(0, groups, (k,), generator=g).to(value_of(node).dtype) for node in index}
    given[source] = torch.arange(count, dtype=torch.float64).view(value_of(source).shape)
    try:
        places = probe.run(matrix, {**given, **around}, without_casts=True).long()
    except KeyError:
        return Refusal("scales or zeros are placed by values that are not known here", near=True)
    # places[k, n] = group_step * group(k) + n_step * n
    columns = torch.arange(n)
    options = [(torch.arange(k) // (k // groups), None)] if groups <= k and k % groups == 0 else []
    options += [(given[node].long(), node) for node in index if groups > 1]
    for group, node in options:
        for group_step, n_step in ((0, 0),) if count == 1 else ((n, 1), (1, groups)):
            if torch.equal(places, (group * group_step).unsqueeze(1) + columns * n_step):
                casts = _rounding(value_of(source).dtype, reversed(casts), integers)
                return Operand(source, groups, group_step, n_step, casts), node
    return Refusal("scales or zeros do not follow groups of neighbouring inputs", near=True)


def _rounding(dtype: torch.dtype, casts: Iterable[torch.dtype], integers: bool) -> tuple[torch.dtype, ...]:
    """The `casts` of numbers of `dtype` without those that change none. The operation widens what it is given itself;
    widened in the graph it would be another tensor at every step: a pass over it, and the kernel's look at it anew."""
    kept = []
    for cast in casts:
        if not _holds_all(cast, dtype) or not (integers or dtype.is_floating_point):
            kept.append(cast)
            dtype = cast
    return tuple(kept)


def _holds_all(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of `narrow`, a dtype that the operation reads, is one of the floating-point dtype `wide`."""
    if not wide.is_floating_point or narrow not in READ:
        return False
    if narrow.is_floating_point:
        return torch.promote_types(wide, narrow) == wide
    return torch.iinfo(narrow).max <= 2 / torch.finfo(wide).eps  # up to 2 ** (digits of wide) all integers are there


def _equal(matrix, weight: Weight, index: list[torch.fx.Node]) -> bool:
    """Whether the graph and the operation agree on random weights, scales and zeros."""
    k, n = value_of(matrix).shape
    form = layouts.get(weight.layout)
    given = {weight.node: _random(weight.node, 2), weight.scales.source: _random(weight.scales.source, 3)}
    low, high = form.range
    if weight.zeros is not None:
        source = weight.zeros.source
        zeros = torch.randint(low, high + 1, value_of(source).shape, generator=torch.Generator().manual_seed(4))
        given[source] = (zeros - weight.zero_offset).to(value_of(source).dtype)
    for node in index:
        idx = torch.randint(0, weight.scales.groups, (k,), generator=torch.Generator().manual_seed(5))
        given[node] = idx.to(value_of(node).dtype)
    found = probe.run(matrix, given)

    def argument(operand, offset=0):
        return operand and placed(given[operand.source], operand, n, offset, lambda op, *args: op(*args))

    groups = weight.scales.groups
    zeros = argument(weight.zeros, weight.zero_offset)
    meant = eager.dequantise(
        given[weight.node],
        argument(weight.scales),
        None if zeros is None else zeros.expand(groups, n),
        None if weight.g_idx is None else given[weight.g_idx],
        weight.layout,
        k,
        torch.float64,
    ).T
    # The graph may round the difference and the product.
    unit = max(TABLE[found.dtype].unit, torch.finfo(torch.float32).eps / 2)
    return bool(((found.double() - meant).abs() <= 4 * unit * meant.abs()).all())


def placed(source, operand: Operand, n: int, offset: int, call):
    """`source` (plus `offset`) as the operation wants it, [G, N] or [1, N], by aten operations; or as it is."""
    for dtype in operand.casts:
        source = call(prims.convert_element_type.default, source, dtype)
    if offset:
        source = call(aten.add.Tensor, call(prims.convert_element_type.default, source, torch.float32), offset)
    if (operand.group_step, operand.n_step) == (0, 0):
        return call(aten.expand.default, call(aten.view.default, source, [1, 1]), [1, n])
    if operand.n_step == 1:
        shape = (source if isinstance(source, torch.Tensor) else value_of(source)).shape
        is_that = shape == (operand.groups, n)
        return source if is_that else call(aten.view.default, source, [operand.groups, n])
    return call(aten.permute.default, call(aten.view.default, source, [n, operand.groups]), [1, 0])
