"""What checkpoints hold, brought into the arguments of `gcu::dequant_gemm`; what is wrong names layer and format."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gcu_compile.errors import CheckpointError
from gcu_compile.kernels.dequant_gemm import layouts


@dataclass(frozen=True)
class Linear:
    """A quantised linear layer. `layout` and the tensors are arguments of `gcu::dequant_gemm`; `order` [K]: the
    inputs in the order that the weight has them, where act-order was undone by sorting."""

    layout: str
    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    g_idx: torch.Tensor | None
    order: torch.Tensor | None

    def of_integers(self) -> Linear:
        """The same for `gcu::int8_gemm`, whose host kernel converts scales of other dtypes at every call."""
        return replace(self, scales=self.scales.float())


def prepare(
    name: str,
    kind: str,
    layout: str,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    target: str | None = None,
    inputs: int | None = None,
    sort: bool = True,
) -> Linear:
    """Check a layer of a checkpoint and lay it out for a target.

    Args:
        name, kind: of the layer and of its format, for messages (`model.layers.0.mlp.down_proj`, `GPTQ int4`).
        layout: of `weight`.
        scales, zeros: [G, N]; zeros in the codes' range.
        g_idx: [K], or None. One whose groups are of equal size is undone by sorting the inputs.
        target: the layout to make; None: as it is.
        inputs: K, where the stored weight is longer than that.
        sort: undo a `g_idx` of equal groups by an order of the inputs; False: keep it.

    Raises:
        CheckpointError: sizes that do not fit, scales that are not finite, groups that do not exist.
    """

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{name} ({kind}): {what}")

    form = layouts.get(layout)
    groups, n = scales.shape
    k = inputs or _inputs(form, weight)
    if tuple(weight.shape) != form.shape(n, k):
        stored = list(form.shape(n, k))
        raise wrong(f"weight is {list(weight.shape)}, {n} outputs x {k} inputs are {stored}; truncated?")
    if zeros is not None and zeros.shape != scales.shape:
        raise wrong(f"zeros are {list(zeros.shape)}, scales {list(scales.shape)}")
    if not bool(torch.isfinite(scales).all()):
        raise wrong(f"{int((~torch.isfinite(scales)).sum())} scales are NaN or infinite")
    order = None
    if g_idx is None:
        if k % groups:
            raise wrong(f"{groups} groups do not divide {k} inputs")
    else:
        if g_idx.shape != (k,) or (k and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups):
            raise wrong(f"g_idx must be [{k}] with groups 0 .. {groups - 1}")
        g_idx, order = _sorted(g_idx, groups) if sort else (g_idx.to(torch.int32), None)
    new = layouts.get(target or layout)
    if order is not None or new is not form:
        weight = layouts.repack(weight, form, new, n, k, order)
    if zeros is not None and new.midpoint != form.midpoint:
        zeros = zeros + (new.midpoint - form.midpoint)
    return Linear(new.name, weight, _smallest(scales.contiguous()), zeros, g_idx, order)


def from_codes(name: str, kind: str, codes: torch.Tensor, scales: torch.Tensor, target: str) -> Linear:
    """A layer that was quantised here: codes [N, K] around 0, scales [G, N], laid out as `target`."""
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{name} ({kind}): a scale is NaN or infinite")
    form = layouts.get(target)
    return Linear(form.name, layouts.pack_blocks(codes, form), _smallest(scales), None, None, None)


def _inputs(form: layouts.Layout, weight: torch.Tensor) -> int:
    words = weight.shape[1] if form.rows == "n" else weight.shape[0]
    return words * (form.per_word if form.packed == "k" else 1)


def _sorted(g_idx: torch.Tensor, groups: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(g_idx still needed, order of the inputs): nothing for neighbours, an order for groups of equal size."""
    counts = torch.bincount(g_idx.long(), minlength=groups)
    if not bool((counts == counts[0]).all()):
        return g_idx.to(torch.int32), None
    order = torch.argsort(g_idx, stable=True)
    return None, None if torch.equal(order, torch.arange(len(order))) else order


def _smallest(scales: torch.Tensor) -> torch.Tensor:
    """`scales` in 16 bits where that changes none of them."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return scales.to(dtype)
    return scales


def packed_zeros(stored: torch.Tensor, bits: int, groups: int, n: int, plus_one: bool = False) -> torch.Tensor:
    """[G, N] zeros of int32 words packed along N, in order.

    Args:
        plus_one: GPTQ's first format (`checkpoint_format: gptq`) stores zero - 1, a zero of 0 as the highest code. Its
            second (`gptq_v2`) stores the zero.
    """
    form = layouts.get("int4_rows_i32" if bits == 4 else "int8_rows_i32")
    zeros = layouts.unpack(stored, form, groups, n)
    return ((zeros + 1) % (1 << bits) if plus_one else zeros).contiguous()


def awq_zeros(stored: torch.Tensor, groups: int, n: int) -> torch.Tensor:
    """[G, N] zeros of AWQ's qzeros [G, N / 8], whose codes lie in the words in the order of its weights."""
    return layouts.unpack(stored, layouts.get("awq_int4"), n, groups).T.contiguous()


def static_range(
    name: str, kind: str, scales: torch.Tensor, zeros: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One scale (and zero), [1], for a merged layer whose parts were calibrated apart: the union of their ranges."""
    scales = scales.float().reshape(-1)
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise CheckpointError(f"{name} ({kind}): input_scale must be positive and finite, found {scales.tolist()}")
    if zeros is None:
        return scales.max().reshape(1), None
    zeros = zeros.to(torch.int32).reshape(-1)
    high, low = (scales * (127 - zeros)).max(), (scales * (-128 - zeros)).min()
    scale = (high - low) / 255.0
    return scale.reshape(1), torch.round(-128 - low / scale).to(torch.int32).reshape(1)
