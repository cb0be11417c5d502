"""Calls `dequant_gemm_kernel.py`: `gcu::dequant_gemm` and its grouped form."""

from __future__ import annotations

import torch

from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.kernels.triton.configs import configs
from gcu_compile.kernels.triton.launch import launch, missing, power_of_two, target_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# bits -> the layout that loads as it lies on the cards; `layouts.repack` makes it.
LAYOUTS = {4: "gptq_int4", 8: "int8_columns"}
LEAST_K = 16  # tl.dot's smallest depth


def refuses_layout(layout: str, target: str) -> str | None:
    """Why no Triton kernel reads weights of this layout on the target, or None."""
    form = layouts.get(layout)
    remedy = f"; repack to {LAYOUTS[form.bits]}"
    if form.tile or form.packed != "k" or form.order != tuple(range(form.per_word)):
        return f"layout {layout} does not unpack along the inputs in order{remedy}"
    if form.rows == "n" and target == "gcu300":
        return f"layout {layout} has inputs innermost: gcu300's compiler gets transposed tiles wrong{remedy}"
    return None


def refuses(x, weight, scales, zeros=None, g_idx=None, bias=None, *, layout) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}, not one of {', '.join(map(str, FLOATS))}"
    form, k = layouts.get(layout), x.shape[-1]
    if reason := refuses_layout(layout, target_of(x)):
        return reason
    group = k if g_idx is not None else k // max(1, scales.shape[-2])
    if group % form.per_word and scales.shape[-2] > 1:
        return f"groups of {group} inputs share words of {form.per_word}"
    if max(x.numel(), weight.numel(), x.numel() // max(1, k) * scales.shape[-1]) >= 2**31:
        return "offsets do not fit 32 bits"
    return missing()


def refuses_grouped(x, offsets, weight, *args, **kwargs) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    return refuses(x, weight, *args, **kwargs)


def run(x, weight, scales, zeros=None, g_idx=None, bias=None, *, layout) -> torch.Tensor:
    """`gcu::dequant_gemm`; see `dequant_gemm/eager.py`."""
    flat = x.reshape(-1, x.shape[-1])
    return _multiply(flat, None, weight, scales, zeros, g_idx, bias, layout).view(*x.shape[:-1], scales.shape[-1])


def run_grouped(x, offsets, weight, scales, zeros=None, g_idx=None, bias=None, *, layout) -> torch.Tensor:
    """`gcu::dequant_gemm_grouped`; see `dequant_gemm/eager.py`."""
    return _multiply(x, offsets.to(torch.int32), weight, scales, zeros, g_idx, bias, layout)


def _multiply(x, offsets, weight, scales, zeros, g_idx, bias, layout) -> torch.Tensor:
    from gcu_compile.kernels.triton.dequant_gemm_kernel import dequant_gemm_kernel

    form, (rows, k) = layouts.get(layout), x.shape
    groups, n = scales.shape[-2:]
    out = x.new_zeros(rows, n)
    if not rows or not n:
        return out
    config = configs("dequant_gemm", target_of(x))[0]
    tile = config.tile
    # With act-order all inputs are one run; their groups are looked up one by one.
    runs, group = (1, k) if g_idx is not None else (groups, k // groups)
    block_m = tile["ROWS_DECODE" if rows <= tile["ROWS_DECODE"] or offsets is not None else "BLOCK_M"]
    block_k = max(LEAST_K, form.per_word, min(tile["BLOCK_K"], power_of_two(group)))
    experts = 1 if offsets is None else offsets.shape[0] - 1
    grid_m = -(-rows // block_m) if offsets is None else rows // block_m + experts
    grid_n = -(-n // tile["BLOCK_N"])
    splits = max(1, min(tile["PROGRAMS"] // (grid_m * grid_n), runs))
    result = out if splits == 1 else x.new_zeros(splits, rows, n, dtype=torch.float32)
    x = x if x.stride(1) == 1 else x.contiguous()
    word = weight.view(torch.int8) if weight.dtype == torch.uint8 else weight
    strides = (weight.stride(-2), weight.stride(-1)) if form.rows == "k" else (weight.stride(-1), weight.stride(-2))
    launch(
        dequant_gemm_kernel,
        (grid_m * grid_n, splits),
        config,
        result,
        x,
        word,
        scales.contiguous(),
        table(zeros, scales.shape),
        None if g_idx is None else g_idx.to(torch.int32).contiguous(),
        None if bias is None else bias.contiguous(),
        offsets,
        rows,
        n,
        k,
        runs,
        groups,
        experts,
        grid_m,
        x.stride(0),
        weight.stride(0) if offsets is not None else 0,
        K_STRIDE=strides[0],
        N_STRIDE=strides[1],
        GROUP=group,
        BITS=form.bits,
        PER_WORD=form.per_word,
        SIGNED=form.signed,
        MIDPOINT=form.midpoint,
        BLOCK_M=block_m,
        BLOCK_N=tile["BLOCK_N"],
        BLOCK_K=block_k,
        SPLITS=splits,
        EXPERTS=power_of_two(experts),
    )
    if splits == 1:
        return out
    return result.sum(0).to(out.dtype)


def table(zeros: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """Zero points as 32-bit numbers of the scales' shape."""
    if zeros is None:
        return None
    if not zeros.is_floating_point():
        zeros = zeros.to(torch.int32)
    elif zeros.dtype == torch.float64:
        zeros = zeros.to(torch.float32)
    return zeros.expand(shape).contiguous()
