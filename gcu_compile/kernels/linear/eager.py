"""The meaning of a product with a packed weight of bfloat16, in plain torch, and the packing.

packed[s, p, i, j] = weight[STRIP * s + i, 2 * p + j]        zeros where there is no such output or input
"""

from __future__ import annotations

import torch

STRIP = 32  # outputs whose numbers for two inputs are neighbours; as in host/linear.cpp


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [N, K] in strips, [ceil(N / STRIP), ceil(K / 2), STRIP, 2]."""
    n, k = weight.shape
    strips, pairs = -(-n // STRIP), -(-k // 2)
    if (n, k) != (strips * STRIP, 2 * pairs):
        weight = torch.nn.functional.pad(weight, (0, 2 * pairs - k, 0, strips * STRIP - n))
    return weight.view(strips, STRIP, pairs, 2).transpose(1, 2).contiguous()


def unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The weight [n, k] that `pack` was given."""
    strips, pairs, strip, two = packed.shape
    return packed.transpose(1, 2).reshape(strips * strip, pairs * two)[:n, :k]


def linear(x: torch.Tensor, weight: torch.Tensor, n: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ unpack(weight).T + bias, summed in float32 (float64 for float64) and rounded once.

    Args:
        x: [..., K], floating point.
        weight: what `pack` makes of [n, K], the dtype of x.
        n: outputs.
        bias: [n].

    Returns:
        [..., n], the dtype of x.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute) @ unpack(weight, n, x.shape[-1]).to(compute).T
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)
