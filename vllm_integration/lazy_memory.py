"""Host memory of a KV cache that is zero from the start and taken from the machine only where it is touched.

vLLM fills the whole cache with zeros at start: a second for each 2 GiB, cold or warm, and all of it resident though
most blocks wait long for their first token. The kernel hands out zeroed pages anyway.
"""

from __future__ import annotations

import math

import torch
from torch.overrides import TorchFunctionMode

from gcu_compile.kernels.host import pages

# Below this size the time of zeros is not worth a mapping.
SMALLEST_BYTES = 64 << 20


class LazyZeros(TorchFunctionMode):
    """Within it, large `torch.zeros(size, dtype=torch.int8)` on the CPU take memory where they are touched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.zeros and len(args) == 1 and set(kwargs) <= {"dtype", "device"}:
            size = (args[0],) if isinstance(args[0], int) else tuple(args[0])
            on_cpu = torch.device(kwargs.get("device") or "cpu").type == "cpu"
            if on_cpu and kwargs.get("dtype") == torch.int8 and math.prod(size) >= SMALLEST_BYTES:
                return pages.zeros(size, torch.int8)
        return func(*args, **kwargs)
