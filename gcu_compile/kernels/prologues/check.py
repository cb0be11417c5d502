"""Which arguments the prologues take; what is wrong is said by name."""

from __future__ import annotations

import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels.dequant_gemm.check import ACTIVATIONS


def _rows(op: str, x: torch.Tensor) -> None:
    if x.dtype not in ACTIVATIONS:
        raise InvalidInputError(f"gcu::{op}: x is {x.dtype}, expected floating point")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InvalidInputError(f"gcu::{op}: x is {list(x.shape)}, expected rows of at least one value")


def _like(op: str, name: str, x: torch.Tensor, other: torch.Tensor | None) -> None:
    if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
        raise InvalidInputError(
            f"gcu::{op}: {name} is {list(other.shape)} {other.dtype}, x is {list(x.shape)} {x.dtype}"
        )


def rms_norm_quant(x, residual, weight, eps) -> None:
    """Raise `InvalidInputError` for arguments that have no meaning."""
    _rows("rms_norm_quant", x)
    _like("rms_norm_quant", "residual", x, residual)
    if weight.shape != x.shape[-1:] or not weight.is_floating_point():
        raise InvalidInputError(
            f"gcu::rms_norm_quant: weight is {list(weight.shape)} {weight.dtype}, expected floats [{x.shape[-1]}]"
        )


def silu_mul_quant(x, up=None) -> None:
    """Raise `InvalidInputError` for arguments that have no meaning."""
    _rows("silu_mul_quant", x)
    _like("silu_mul_quant", "up", x, up)
    if up is None and x.shape[-1] % 2:
        raise InvalidInputError(f"gcu::silu_mul_quant: {x.shape[-1]} values are not a gate and an up of equal size")
