"""Numbers of the element types, as `enum Dtype` of simd.h has them."""

from __future__ import annotations

import torch

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = {**FLOATS, torch.int8: 3, torch.uint8: 4, torch.int16: 5, torch.int32: 6}
NONE = -1
