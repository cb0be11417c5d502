"""Calls `prologues_kernel.py`: `gcu::rms_norm_quant` and `gcu::silu_mul_quant`."""

from __future__ import annotations

import torch

from gcu_compile.kernels.triton.configs import configs
from gcu_compile.kernels.triton.dequant_gemm import FLOATS
from gcu_compile.kernels.triton.launch import launch, missing, power_of_two, target_of


def refuses(x, other=None, weight=None, eps=0.0) -> str | None:
    """Why the Triton kernels cannot take these arguments, or None."""
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}"
    return "offsets do not fit 32 bits" if x.numel() >= 2**31 else missing()


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(kernel, shape: torch.Size, x: torch.Tensor, *middle, strides: tuple[int, ...]):
    """Codes and scales of rows that `kernel` makes of `middle`."""
    size = shape[-1]
    codes = torch.empty(shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((*shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows = scales.numel()
    if rows:
        config = configs("prologues", target_of(x))[0]
        columns = min(power_of_two(size), config.tile["COLUMNS"])
        block = max(1, min(config.tile["ELEMENTS"] // columns, power_of_two(rows)))
        grid = (min(config.tile["PROGRAMS"], -(-rows // block)),)
        constants = {"ROWS": block, "COLUMNS": columns, "ONE_TILE": size <= columns}
        launch(kernel, grid, config, codes, scales, *middle, rows, size, *strides, exact=True, **constants)
    return codes, scales


def rms_norm_quant(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gcu::rms_norm_quant`; see `prologues/eager.py`."""
    from gcu_compile.kernels.triton.prologues_kernel import rms_norm_quant_kernel

    rows, other = _rows(x), None if residual is None else _rows(residual)
    total = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kept = None if residual is None else total
    strides = (rows.stride(0), 0 if other is None else other.stride(0))
    middle = (kept, rows, other, weight.contiguous(), float(eps))
    return *_launch(rms_norm_quant_kernel, x.shape, x, *middle, strides=strides), total


def silu_mul_quant(x, up=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`gcu::silu_mul_quant`; see `prologues/eager.py`."""
    from gcu_compile.kernels.triton.prologues_kernel import silu_mul_quant_kernel

    gate, up = x.chunk(2, -1) if up is None else (x, up)
    shape, gate, up = gate.shape, _rows(gate), _rows(up)
    if gate.stride(0) != up.stride(0):
        gate, up = gate.contiguous(), up.contiguous()
    return _launch(silu_mul_quant_kernel, shape, x, gate, up, strides=(gate.stride(0),))
