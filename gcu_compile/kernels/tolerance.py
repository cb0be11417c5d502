"""The one tolerance table: how far a result may be from the float64 reference, and why.

An output value is a sum of `length` products, accumulated in float32 and rounded once to the output
dtype. Errors of the sum grow like sqrt(length) for rounding that is not biased (Higham, Accuracy and
Stability of Numerical Algorithms, section 2.8), so

    rtol = output rounding + factor * accumulation unit * sqrt(length),      atol = rtol * scale

with `scale` the size of the summands' typical sum (1 for normalised inputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gcu_compile.errors import UnknownNameError


@dataclass(frozen=True)
class Row:
    """`unit`: half the spacing of numbers near 1 in the output dtype. `inputs`: roundings of that size
    which intermediate values (a probability, a normalised activation) may suffer on the way."""

    unit: float
    inputs: int
    why: str


TABLE: dict[torch.dtype, Row] = {
    torch.float64: Row(2**-53, 8, "53-bit significand; references only"),
    torch.float32: Row(2**-24, 8, "24-bit significand; a few roundings of intermediate values"),
    torch.float16: Row(2**-11, 3, "11-bit significand; inputs are exact, intermediates may be rounded twice"),
    torch.bfloat16: Row(2**-8, 3, "8-bit significand; inputs are exact, intermediates may be rounded twice"),
}
ACCUMULATION_UNIT = 2**-24  # every accumulator is float32 or wider
FACTOR = 4.0  # peak over typical error: the largest of about 1e5 normally distributed values


def tolerance(dtype: torch.dtype, length: int = 1, scale: float = 1.0) -> dict[str, float]:
    """`{"rtol": ..., "atol": ...}` for `torch.testing.assert_close` against a float64 reference.

    Args:
        dtype: of the output.
        length: of the longest sum in one output value.
        scale: magnitude of a typical output value; absolute error scales with it.
    """
    if dtype not in TABLE:
        raise UnknownNameError("dtype of the tolerance table", dtype, map(str, TABLE))
    row = TABLE[dtype]
    accumulation = 2**-53 if dtype == torch.float64 else ACCUMULATION_UNIT
    rtol = row.unit * row.inputs + FACTOR * accumulation * math.sqrt(max(1, length))
    return {"rtol": rtol, "atol": rtol * scale}
