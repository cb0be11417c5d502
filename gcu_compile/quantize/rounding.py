"""The formats of the vendor's release notes, and rounding a weight to the nearest code of one.

    w4a16   4-bit weights in groups
    w8a16   8-bit weights, a scale per output
    w8a8    8-bit weights, a scale per output; 8-bit activations, a scale per token as they come
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP_SIZES = (128, 64, 32)  # tried in this order where none is asked for


@dataclass(frozen=True)
class Format:
    """A way to store a linear layer: bits, whether a scale serves a group or an output, and who is quantised."""

    bits: int
    grouped: bool
    activations: bool = False

    def group_size(self, *inputs: int) -> int | None:
        """The largest of `GROUP_SIZES` that divides all `inputs`; None: a scale per output."""
        if not self.grouped:
            return None
        return next((size for size in GROUP_SIZES if not any(k % size for k in inputs)), None)


FORMATS = {"w4a16": Format(4, True), "w8a16": Format(8, False), "w8a8": Format(8, False, activations=True)}


def to_nearest(weight: torch.Tensor, bits: int, size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes of a weight.

    Args:
        weight: [N, K], floating point and finite.
        size: inputs per scale, a divisor of K; None: K.

    Returns:
        codes [N, K] int16 in -2**(bits - 1) .. 2**(bits - 1) - 1, and scales [N, K / size] in the weight's dtype: the
        middle of the codes' range reaches the largest weight. weight is about codes * scales.
    """
    n, k = weight.shape
    half = 1 << (bits - 1)
    groups = weight.to(torch.float32).view(n, -1, size or k)
    scales = (groups.abs().amax(-1) / (half - 0.5)).to(weight.dtype)
    divisor = torch.where(scales == 0, 1, scales).to(torch.float32).unsqueeze(-1)
    codes = torch.round(groups / divisor).clamp(-half, half - 1)
    return codes.view(n, k).to(torch.int16), scales


def to_nearest_with_zeros(
    weight: torch.Tensor, bits: int, size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of a weight whose groups need not be centred on 0.

    Their range reaches from the smallest weight of the group (or 0) to the largest (or 0).

    Args:
        weight, bits, size: as for `to_nearest`.

    Returns:
        codes [N, K] and zeros [N, K / size], int16 in -2**(bits - 1) .. 2**(bits - 1) - 1, and scales [N, K / size] in
        the weight's dtype. weight is about (codes - zeros) * scales.
    """
    n, k = weight.shape
    half = 1 << (bits - 1)
    groups = weight.to(torch.float32).view(n, -1, size or k)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / (2 * half - 1)).to(weight.dtype)
    divisor = torch.where(scales == 0, 1, scales).to(torch.float32)
    zeros = (torch.round(-low / divisor) - half).clamp(-half, half - 1)
    codes = (torch.round(groups / divisor.unsqueeze(-1)) + zeros.unsqueeze(-1)).clamp(-half, half - 1)
    return codes.view(n, k).to(torch.int16), scales, zeros.to(torch.int16)
