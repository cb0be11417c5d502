"""The meaning of quantised matrix products, in plain torch.

A code q stands for (q - zero) * scale; a group of neighbouring inputs k shares zero and scale. Products are
summed in float32 (float64 for float64 activations) and rounded once, to the output's dtype. Weights are not rounded
to the activations' dtype on the way: where a model's own text does that, this is the more exact of the two. A kernel
may do it too (the host's does, with AMX and many rows of bfloat16): the rounding of one weight is that of the output,
and those of a sum cancel, so that it stays within the tolerance of `kernels/tolerance.py`.
"""

from __future__ import annotations

import torch

from gcu_compile.kernels.dequant_gemm import layouts

INT8_MAX = 127.0


def codes(weight: torch.Tensor, layout: str, n: int, k: int) -> torch.Tensor:
    """[n, k] int16 codes of a stored weight, or [E, n, k] of E stacked ones."""
    form = layouts.get(layout)
    if weight.dim() == len(form.shape(n, k)) + 1:
        return torch.stack([layouts.unpack(one, form, n, k) for one in weight])
    return layouts.unpack(weight, form, n, k)


def dequantise(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    layout: str,
    k: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight as numbers, [N, K] of `dtype`: (code - zero) * scale."""
    form = layouts.get(layout)
    groups, n = scales.shape
    if g_idx is None:
        g_idx = torch.arange(k, device=scales.device) // (k // groups)
    zero = form.midpoint if zeros is None else zeros.expand(groups, n).to(dtype)[g_idx].T
    return (codes(weight, layout, n, k).to(dtype) - zero) * scales.to(dtype)[g_idx].T


def dequant_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    layout: str,
) -> torch.Tensor:
    """Linear layer of a quantised weight: y = x @ dequantise(weight).T + bias.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 for references).
        weight: codes [N, K] stored as `layout` says.
        scales: [G, N], floating point; group g is the inputs [g * K / G, (g + 1) * K / G). G = 1: per channel. Any
            strides: a per-tensor scale is one value expanded to [1, N].
        zeros: [G, N] or what broadcasts to it, integers or floats in the codes' own range; None: the layout's
            midpoint.
        g_idx: [K] integers, the group of each input (act-order); None: groups are neighbours.
        bias: [N].

    Returns:
        [..., N], the dtype of x.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    numbers = dequantise(weight, scales, zeros, g_idx, layout, x.shape[-1], compute)
    y = x.to(compute) @ numbers.T
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)


def quantize(
    x: torch.Tensor, group_size: int = 0, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations to int8, each token (or each group of a token) with a scale of its own.

    symmetric:  scale = max|x| / 127,            zero = 0,                       code = rne(x / scale)
    asymmetric: scale = (max - min) / 255,       zero = rne(-128 - min / scale), code = rne(x / scale) + zero
    with min <= 0 <= max, clamped to -128 .. 127 (symmetric: -127 .. 127 by construction), rounding half to even, in
    float32. A row of zeros has scale 0 and codes 0.

    Args:
        x: [..., K].
        group_size: divides K; 0: one group.

    Returns:
        codes [..., K] int8, scales [..., G] float32, zeros [..., G] int32; x is about (code - zero) * scale.
    """
    size = group_size or x.shape[-1]
    grouped = x.to(torch.float32).unflatten(-1, (-1, size))
    if symmetric:
        scales = grouped.abs().amax(-1) / INT8_MAX
    else:
        high, low = grouped.amax(-1).clamp(min=0), grouped.amin(-1).clamp(max=0)
        scales = (high - low) / 255.0
    divisor = torch.where(scales == 0, 1.0, scales)
    zeros = torch.zeros_like(scales) if symmetric else torch.round(-128.0 - low / divisor)
    zeros = torch.where(scales == 0, 0.0, zeros)
    whole = torch.round(grouped / divisor.unsqueeze(-1)) + zeros.unsqueeze(-1)
    return whole.clamp(-128, 127).to(torch.int8).flatten(-2), scales, zeros.to(torch.int32)


def quantize_static(x: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """int8 codes of `x` for scales (and zeros) that are known before: clamp(rne(x / scale) + zero, -128, 127)."""
    whole = torch.round(x.to(torch.float32) / scales.to(torch.float32))
    return (whole if zeros is None else whole + zeros).clamp(-128, 127).to(torch.int8)


def int8_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    x_scales: torch.Tensor | None = None,
    x_zeros: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    layout: str,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Linear layer in integers: y = sum_k (xq - xz) * (wq - wz) * x_scale * scale + bias; the sum is exact.

    Args:
        x: [..., K]. int8: codes that have `x_scales` (and `x_zeros`). Floating point: quantised here, by the given
            scales (static) or, without them, per token and symmetrically (`quantize`).
        weight: codes [N, K] stored as `layout` says, 8 bits.
        scales: [1, N], floating point; a per-tensor scale is one value expanded.
        x_scales: [..., 1] per token, or [1] for the tensor.
        x_zeros: integers in the codes' range, of the shape of x_scales; None: 0.
        zeros: [1, N] integers in the codes' range; None: the layout's midpoint.
        bias: [N].
        out_dtype: of the result; None: the dtype of a floating-point x, float32 for int8 codes.

    Returns:
        [..., N] of `out_dtype`.
    """
    out_dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    form, n, k = layouts.get(layout), scales.shape[-1], x.shape[-1]
    if x.is_floating_point():
        if x_scales is None:
            x, x_scales, x_zeros = quantize(x)
        else:
            x = quantize_static(x, x_scales, x_zeros)
    # float64 holds every sum of up to 2**37 such products exactly.
    left = x.to(torch.float64) - (0 if x_zeros is None else x_zeros)
    right = codes(weight, layout, n, k).to(torch.float64) - (
        form.midpoint if zeros is None else zeros.expand(1, n).reshape(n, 1)
    )
    y = (left @ right.T).to(torch.float32) * x_scales.to(torch.float32) * scales.to(torch.float32).reshape(n)
    return (y if bias is None else y + bias.to(torch.float32)).to(out_dtype)


def grouped(one, x: torch.Tensor, offsets: torch.Tensor, per_expert: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """`one(rows, **arguments of expert e)` for the rows [offsets[e], offsets[e + 1]) of x.

    Written without data-dependent shapes: every expert computes every row, and a row keeps its own expert's.
    """
    row = torch.arange(x.shape[0], device=x.device)
    result = None
    for expert in range(offsets.shape[0] - 1):
        arguments = {name: None if value is None else value[expert] for name, value in per_expert.items()}
        y = one(x, **arguments)
        mine = ((row >= offsets[expert]) & (row < offsets[expert + 1])).unsqueeze(-1)
        result = torch.where(mine, y, torch.zeros_like(y) if result is None else result)
    return result


def dequant_gemm_grouped(x, offsets, weight, scales, zeros=None, g_idx=None, bias=None, *, layout):
    """`dequant_gemm` of a mixture of experts: rows of x are sorted by expert.

    Args:
        x: [T, K].
        offsets: [E + 1] integers, ascending from 0 to T: expert e has the rows [offsets[e], offsets[e + 1]).
        weight, scales, zeros, g_idx, bias: those of `dequant_gemm`, with a leading dimension E.

    Returns:
        [T, N], the dtype of x; rows outside all experts are zero.
    """
    per_expert = {"weight": weight, "scales": scales, "zeros": zeros, "g_idx": g_idx, "bias": bias}
    return grouped(lambda rows, **one: dequant_gemm(rows, **one, layout=layout), x, offsets, per_expert)


def int8_gemm_grouped(
    x, offsets, weight, scales, x_scales=None, bias=None, *, layout, out_dtype=None, x_zeros=None, zeros=None
):
    """`int8_gemm` of a mixture of experts.

    Args:
        x: [T, K], int8 codes or floating point.
        offsets: as in `dequant_gemm_grouped`.
        weight, scales, zeros, bias: those of `int8_gemm`, with a leading dimension E.
        x_scales, x_zeros: those of `int8_gemm`: [T, 1] of the rows, or [1] of them all; or [E, 1, 1], an expert's own.

    Returns:
        [T, N] of `out_dtype`; rows outside all experts are zero.
    """
    of_x = {"x_scales": x_scales, "x_zeros": x_zeros}
    of_rows = {name: value for name, value in of_x.items() if value is None or value.dim() < 3}
    of_experts = {name: value for name, value in of_x.items() if name not in of_rows}

    def one(rows, **arguments):
        return int8_gemm(rows, **of_rows, layout=layout, out_dtype=out_dtype, **arguments)

    return grouped(one, x, offsets, {"weight": weight, "scales": scales, "zeros": zeros, "bias": bias, **of_experts})
