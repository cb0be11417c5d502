"""What the kernels that sum in 32 bits cannot take, and the meaning, in float64, can."""

from __future__ import annotations

import torch

# The most inputs whose sum fits: products are at most 255 * 128, and 255 * 255 where both sides have zeros.
MOST_INPUTS = (2**31 - 1) // (255 * 128)
MOST_INPUTS_WITH_ZEROS = (2**31 - 1) // (255 * 255)


def too_many(inputs: int, x_zeros: bool, zeros: bool) -> str | None:
    """Why a sum over so many inputs, with or without zeros of x and of the weight, may leave 32 bits, or None."""
    most = MOST_INPUTS_WITH_ZEROS if x_zeros and zeros else MOST_INPUTS
    return f"a sum over {inputs} inputs may not fit in 32 bits; {most} do" if inputs > most else None


def fractional(x_zeros: torch.Tensor | None, zeros: torch.Tensor | None, look: bool) -> str | None:
    """Why zero points are not, or may not be, whole numbers; None: they are.

    Args:
        look: at the values of those that have a float dtype, for which a device would be waited for. Integers are
            whole, so that it costs nothing where zeros are what `quantize` and the layers hand over.
    """
    for name, tensor in (("x_zeros", x_zeros), ("zeros", zeros)):
        if tensor is None or not tensor.is_floating_point():
            continue
        if not look:
            return f"{name} are {tensor.dtype}: zero points that may not be whole numbers"
        if not torch.equal(tensor.to(torch.int32).to(tensor.dtype), tensor):
            return f"{name} are zero points that are not whole numbers"
    return None
