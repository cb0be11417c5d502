"""Which arguments the quantised products take; what is wrong is said by name."""

from __future__ import annotations

import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels.dequant_gemm import layouts

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shapes(op: str, expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        try:
            fits = tuple(torch.broadcast_shapes(tensor.shape, shape)) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InvalidInputError(f"gcu::{op}: {name} is {list(tensor.shape)}, expected {list(shape)}")


def weight_of(op: str, weight: torch.Tensor, layout: str, n: int, k: int, experts: tuple[int, ...] = ()) -> None:
    """Raise unless `weight` stores [n, k] codes (of each of `experts`)."""
    form = layouts.get(layout)
    expected = (*experts, *form.shape(n, k))
    if tuple(weight.shape) != expected or weight.dtype != form.word:
        raise InvalidInputError(
            f"gcu::{op}: weight is {list(weight.shape)} {weight.dtype}; layout {layout} stores {n} outputs x {k} "
            f"inputs as {list(expected)} {form.word}"
        )


def dequant_gemm(x, weight, scales, zeros=None, g_idx=None, bias=None, *, layout, experts=(), op="dequant_gemm"):
    """Raise `InvalidInputError` for arguments that have no meaning."""
    if x.dtype not in ACTIVATIONS:
        raise InvalidInputError(f"gcu::{op}: x is {x.dtype}, expected floating point")
    if scales.dim() != 2 + len(experts) or not scales.is_floating_point():
        raise InvalidInputError(f"gcu::{op}: scales are {list(scales.shape)} {scales.dtype}, expected floats [G, N]")
    groups, n, k = scales.shape[-2], scales.shape[-1], x.shape[-1]
    if g_idx is None and (groups == 0 or k % groups):
        raise InvalidInputError(f"gcu::{op}: {groups} groups do not divide {k} inputs")
    weight_of(op, weight, layout, n, k, experts)
    expected = {"zeros": (zeros, (*experts, groups, n)), "bias": (bias, (*experts, n))}
    _shapes(op, {**expected, "g_idx": (g_idx, (*experts, k))})


def int8_gemm(
    x,
    weight,
    scales,
    x_scales=None,
    x_zeros=None,
    zeros=None,
    bias=None,
    *,
    layout,
    out_dtype=None,
    experts=(),
    op="int8_gemm",
):
    """Raise `InvalidInputError` for arguments that have no meaning."""
    if x.dtype != torch.int8 and x.dtype not in ACTIVATIONS:
        raise InvalidInputError(f"gcu::{op}: x is {x.dtype}, expected int8 codes or floating point")
    if layouts.get(layout).bits != 8:
        raise InvalidInputError(f"gcu::{op}: layout {layout} has {layouts.get(layout).bits} bits, expected 8")
    if x.dtype == torch.int8 and x_scales is None:
        raise InvalidInputError(f"gcu::{op}: int8 codes need x_scales")
    if x_zeros is not None and x_scales is None:
        raise InvalidInputError(f"gcu::{op}: x_zeros need x_scales")
    if scales.dim() != 2 + len(experts) or scales.shape[-2] != 1:
        raise InvalidInputError(f"gcu::{op}: scales are {list(scales.shape)}, expected [1, N]")
    n, k = scales.shape[-1], x.shape[-1]
    weight_of(op, weight, layout, n, k, experts)
    for name, of_x in (("x_scales", x_scales), ("x_zeros", x_zeros)):
        of_experts = bool(experts) and of_x is not None and of_x.dim() == 3
        _shapes(op, {name: (of_x, (*experts, 1, 1) if of_experts else (*x.shape[:-1], 1))})
    _shapes(op, {"zeros": (zeros, (*experts, 1, n)), "bias": (bias, (*experts, n))})


def offsets(op: str, x: torch.Tensor, given: torch.Tensor, experts: int) -> None:
    """Raise unless `given` cuts the rows of x into `experts` pieces."""
    if given.shape != (experts + 1,):
        raise InvalidInputError(f"gcu::{op}: offsets are {list(given.shape)}, expected [{experts + 1}]")
    cuts = given.tolist()
    if cuts[0] < 0 or cuts[-1] > x.shape[0] or any(b < a for a, b in zip(cuts, cuts[1:], strict=False)):
        raise InvalidInputError(f"gcu::{op}: offsets {cuts} do not cut {x.shape[0]} rows")


def group_indices(g_idx: torch.Tensor, groups: int) -> torch.Tensor:
    """`g_idx`, after its values were found to name groups that exist."""
    if g_idx.numel() and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise InvalidInputError(f"gcu::dequant_gemm: g_idx leaves the {groups} groups")
    return g_idx


def grouped(one, op: str, x, offsets_, weight, scales, *args, **kwargs) -> None:
    """The checks `one` of a grouped form; offsets have values only on real tensors."""
    experts = tuple(scales.shape[:1])
    if not isinstance(x, torch._subclasses.FakeTensor):
        offsets(op, x, offsets_, *experts)
    one(x, weight, scales, *args, **kwargs, experts=experts, op=op)


def int8_grouped(x, offsets_, weight, scales, x_scales=None, bias=None, **kwargs) -> None:
    """The checks of `int8_gemm_grouped`."""
    kwargs |= {"x_scales": x_scales, "bias": bias}
    grouped(int8_gemm, "int8_gemm_grouped", x, offsets_, weight, scales, **kwargs)


def quantize(x: torch.Tensor, group_size: int) -> None:
    """Raise unless `group_size` divides the rows of x."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InvalidInputError(f"gcu::quantize_per_token: x is {list(x.shape)}, expected [..., K]")
    if group_size < 0 or (group_size and x.shape[-1] % group_size):
        raise InvalidInputError(f"gcu::quantize_per_token: groups of {group_size} do not divide {x.shape[-1]} inputs")
