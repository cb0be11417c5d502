"""Calls `weighted_sum.cpp`: what a mixture's experts gave each token, without a float32 copy of it."""

from __future__ import annotations

import struct

import torch

from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.dtypes import FLOATS

FIELDS = struct.Struct("4P3q2i")  # `struct Arguments` of weighted_sum.cpp, field by field


def refuses(y: torch.Tensor) -> str | None:
    """Why the C++ kernel cannot take `y`, or None."""
    if y.device.type != "cpu":
        return f"y is on {y.device}"
    if y.dtype not in FLOATS:
        return f"y is {y.dtype}, not one of {', '.join(map(str, FLOATS))}"
    return build.refusal("weighted_sum")


def run(y: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Row t is the sum over j of weights[t, j] * y[place[t * top_k + j]], summed in float32, in the dtype of `y`.

    Args:
        y: [rows, size].
        place: [tokens * top_k] int64, rows of `y`: the caller's to keep within.
        weights: [tokens, top_k] float32.
    """
    y, place, weights = y.contiguous(), place.contiguous(), weights.contiguous()
    out = y.new_empty(weights.shape[0], y.shape[1])
    pointers = (tensor.data_ptr() for tensor in (y, place, weights, out))
    fields = (*pointers, *weights.shape, y.shape[1], FLOATS[y.dtype], torch.get_num_threads())
    build.load("weighted_sum").gcu_weighted_sum(FIELDS.pack(*fields))
    return out
