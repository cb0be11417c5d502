"""Calls `int8_gemm_kernel.py` and `quantize_per_token_kernel.py`."""

from __future__ import annotations

import torch

from gcu_compile.kernels.dequant_gemm import eager, integers, layouts
from gcu_compile.kernels.triton.configs import configs
from gcu_compile.kernels.triton.dequant_gemm import FLOATS, refuses_layout, table
from gcu_compile.kernels.triton.launch import launch, missing, power_of_two, target_of


def refuses_quantize(x, group_size=0, symmetric=True) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}, not one of {', '.join(map(str, FLOATS))}"
    return "offsets do not fit 32 bits" if x.numel() >= 2**31 else missing()


def quantize(x, group_size=0, symmetric=True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gcu::quantize_per_token`; see `dequant_gemm/eager.py`."""
    from gcu_compile.kernels.triton.quantize_per_token_kernel import quantize_per_token_kernel

    size = group_size or x.shape[-1]
    groups = (*x.shape[:-1], x.shape[-1] // size)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(groups, dtype=torch.float32, device=x.device)
    zeros = torch.empty(groups, dtype=torch.int32, device=x.device)
    rows = scales.numel()
    if not rows:
        return codes, scales, zeros
    config = configs("quantize_per_token", target_of(x))[0]
    columns = min(power_of_two(size), config.tile["COLUMNS"])
    block = max(1, min(config.tile["ELEMENTS"] // columns, power_of_two(rows)))
    launch(
        quantize_per_token_kernel,
        (min(config.tile["PROGRAMS"], -(-rows // block)),),
        config,
        codes,
        scales,
        zeros,
        x.contiguous(),
        rows,
        size,
        exact=True,
        ROWS=block,
        COLUMNS=columns,
        ONE_TILE=size <= columns,
        SYMMETRIC=symmetric,
    )
    return codes, scales, zeros


def refuses(x, weight, scales, x_scales=None, x_zeros=None, zeros=None, bias=None, *, layout, out_dtype=None):
    """Why the Triton kernel cannot take these arguments, or None."""
    if x.dtype not in (*FLOATS, torch.int8):
        return f"x is {x.dtype}, not torch.int8 or one of {', '.join(map(str, FLOATS))}"
    if reason := refuses_layout(layout, target_of(x)):
        return reason
    if layouts.get(layout).per_word != 1:
        return f"layout {layout} has several codes in a word; repack to int8_columns"
    if reason := integers.fractional(x_zeros, zeros, look=False):
        return reason
    if reason := integers.too_many(x.shape[-1], x_zeros is not None, zeros is not None):
        return reason
    if max(x.numel(), weight.numel(), x.numel() // max(1, x.shape[-1]) * scales.shape[-1]) >= 2**31:
        return "offsets do not fit 32 bits"
    return missing()


def refuses_grouped(
    x, offsets, weight, scales, x_scales=None, bias=None, *, layout, out_dtype=None, x_zeros=None, zeros=None
) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    return refuses(x, weight, scales, x_scales, x_zeros, zeros, layout=layout)


def run(x, weight, scales, x_scales=None, x_zeros=None, zeros=None, bias=None, *, layout, out_dtype=None):
    """`gcu::int8_gemm`; see `dequant_gemm/eager.py`."""
    out_dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]

    def per_row(values):
        return None if values is None else values.reshape(-1, 1).expand(rows, 1)

    y = _multiply(flat, None, weight, scales, per_row(x_scales), per_row(x_zeros), zeros, bias, layout, out_dtype)
    return y.view(*x.shape[:-1], scales.shape[-1])


def run_grouped(
    x, offsets, weight, scales, x_scales=None, bias=None, *, layout, out_dtype=None, x_zeros=None, zeros=None
) -> torch.Tensor:
    """`gcu::int8_gemm_grouped`; see `dequant_gemm/eager.py`."""
    out_dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    of_x = (_by_row(values, offsets, x.shape[0]) for values in (x_scales, x_zeros))
    return _multiply(x, offsets.to(torch.int32), weight, scales, *of_x, zeros, bias, layout, out_dtype)


def _by_row(values: torch.Tensor | None, offsets: torch.Tensor, rows: int) -> torch.Tensor | None:
    """[rows, 1] of what belongs to rows, or of [E, 1, 1] that belong to experts; any, in rows outside of these."""
    if values is None or values.dim() < 3:
        return None if values is None else values.expand(rows, 1)
    row = torch.arange(rows, device=values.device)
    expert = torch.searchsorted(offsets[1:].to(row.dtype), row, right=True).clamp(max=values.shape[0] - 1)
    return values.reshape(-1).index_select(0, expert).unsqueeze(1)


def _multiply(x, offsets, weight, scales, x_scales, x_zeros, zeros, bias, layout, out_dtype) -> torch.Tensor:
    from gcu_compile.kernels.triton.int8_gemm_kernel import int8_gemm_kernel

    form, (rows, k), n = layouts.get(layout), x.shape, scales.shape[-1]
    out = torch.zeros(rows, n, dtype=out_dtype, device=x.device)
    if not rows or not n:
        return out
    if x.is_floating_point():
        if x_scales is None:
            x, x_scales, _ = quantize(x)
        else:
            x = eager.quantize_static(x, x_scales, x_zeros)
    config = configs("int8_gemm", target_of(x))[0]
    tile = config.tile
    block_m = tile["ROWS_DECODE" if rows <= tile["ROWS_DECODE"] or offsets is not None else "BLOCK_M"]
    experts = 1 if offsets is None else offsets.shape[0] - 1
    grid_m = -(-rows // block_m) if offsets is None else rows // block_m + experts
    x = x if x.stride(1) == 1 else x.contiguous()
    zeros = None if zeros is None else table(zeros, scales.shape) - form.midpoint
    strides = (weight.stride(-2), weight.stride(-1)) if form.rows == "k" else (weight.stride(-1), weight.stride(-2))
    launch(
        int8_gemm_kernel,
        (grid_m * -(-n // tile["BLOCK_N"]),),
        config,
        out,
        x,
        weight.view(torch.int8),
        scales.to(torch.float32).contiguous(),
        x_scales.to(torch.float32).expand(rows, 1).contiguous(),
        None if x_zeros is None else x_zeros.to(torch.int32).contiguous(),
        zeros,
        None if bias is None else bias.contiguous(),
        offsets,
        rows,
        n,
        k,
        experts,
        grid_m,
        x.stride(0),
        weight.stride(0) if offsets is not None else 0,
        exact=True,
        K_STRIDE=strides[0],
        N_STRIDE=strides[1],
        UNSIGNED=not form.signed,
        BLOCK_M=block_m,
        BLOCK_N=tile["BLOCK_N"],
        BLOCK_K=max(32, min(tile["BLOCK_K"], power_of_two(k))),
        EXPERTS=power_of_two(experts),
    )
    return out
