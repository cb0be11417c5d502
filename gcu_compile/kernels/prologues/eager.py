"""The meaning of what runs before an int8 product: norm or activation, then quantisation per token.

Everything between the inputs and the rounding to int8 is float32 (float64 for float64 inputs). A model's own text
rounds to the activations' dtype in between; this is the more exact of the two.
"""

from __future__ import annotations

import torch

from gcu_compile.kernels.dequant_gemm.eager import quantize


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm_quant(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """s = x + residual; codes and scales of s / sqrt(mean(s * s) + eps) * weight.

    Args:
        x: [..., H].
        residual: the shape and dtype of x, or None: s = x.
        weight: [H], any floating-point dtype.

    Returns:
        codes [..., H] int8, scales [..., 1] float32: as `gcu::quantize_per_token`, symmetric, one group.
        s [..., H] in the dtype of x; [0] where there is no residual, for then s is x.
    """
    total = _wide(x) if residual is None else _wide(x) + _wide(residual)
    normal = total * torch.rsqrt((total * total).mean(-1, keepdim=True) + eps) * _wide(weight)
    codes, scales, _ = quantize(normal)
    return codes, scales, x.new_empty(0) if residual is None else total.to(x.dtype)


def silu_mul_quant(x: torch.Tensor, up: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of gate * sigmoid(gate) * up.

    Args:
        x: [..., D], the gate; or without `up` [..., 2 * D]: gate and up side by side.
        up: the shape and dtype of x, or None.

    Returns:
        codes [..., D] int8, scales [..., 1] float32: as `gcu::quantize_per_token`, symmetric, one group.
    """
    size = x.shape[-1] // 2
    gate, up = (x.narrow(-1, 0, size), x.narrow(-1, size, size)) if up is None else (x, up)  # sizes may be symbolic
    gate, up = _wide(gate), _wide(up)
    codes, scales, _ = quantize(gate * torch.sigmoid(gate) * up)
    return codes, scales
