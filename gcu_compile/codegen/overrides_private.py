"""What each of Inductor's operations becomes on the device: 32-bit types, scalar constants, native math."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.codegen.triton import TritonKernelOverrides
from torch._inductor.utils import get_bounds_index_expr
from torch._inductor.virtualized import V

# No kernel holds a 64-bit value. Graphs are narrowed before Inductor sees them; this catches what Inductor adds.
NARROW = {torch.int64: torch.int32, torch.uint64: torch.uint32, torch.float64: torch.float32}


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The 32-bit type that stands for `dtype` inside a kernel."""
    return NARROW.get(dtype, dtype)


class GcuOverrides(TritonKernelOverrides):
    """Inductor's Triton operations, without what the device's compiler refuses."""

    @classmethod
    def constant(cls, value: Any, dtype: torch.dtype) -> str:
        """A scalar: Triton broadcasts it, and no tile of size-1 dimensions appears."""
        return cls._shaped_constant(value, narrow(dtype), shape=[])

    @staticmethod
    def to_dtype(
        x: Any, dtype: torch.dtype, src_dtype: torch.dtype | None = None, use_compute_types: bool = True
    ) -> str:
        """A cast, to at most 32 bits."""
        source = None if src_dtype is None else narrow(src_dtype)
        return TritonKernelOverrides.to_dtype(x, narrow(dtype), source, use_compute_types)

    @classmethod
    def index_expr(cls, expr: Any, dtype: torch.dtype) -> Any:
        """A position as a value."""
        kernel = V.kernel
        indexing = kernel.indexing(expr)
        text = f"({indexing.index_str})"
        if not narrow(dtype).is_floating_point:
            narrowed = torch.int32
            if not indexing.expand_shape and not indexing.index.free_symbols:
                text = f"tl.full([], {indexing.index_str}, tl.int32)"
        else:
            narrowed = torch.float32
            constant = f"tl.full([], {indexing.index_str}, tl.float32)"
            text = cls.to_dtype(text, narrowed) if indexing.index.free_symbols else constant
        variable = kernel.cse.generate(
            kernel.compute,
            text,
            dtype=narrowed,
            bounds=get_bounds_index_expr(expr),
            shape=tuple(indexing.expand_shape),
        )
        variable.mask_vars = indexing.mask_vars
        return variable

    @classmethod
    def value_expr(cls, expr: Any, dtype: torch.dtype) -> Any:
        """The same: positions are 32-bit whatever they are used for."""
        return cls.index_expr(expr, dtype)

    @staticmethod
    def rsqrt(x: Any) -> str:
        """Native, where Inductor takes the library's."""
        return f"tl.rsqrt({x})"

    @staticmethod
    def exp(x: Any) -> str:
        """Native, where Inductor may take the library's."""
        return f"tl.exp({x})"

    @staticmethod
    def sqrt(x: Any) -> str:
        """Native: the result is correctly rounded either way."""
        return f"tl.sqrt({x})"

    @staticmethod
    def tanh(x: Any) -> str:
        """From exp, and from its series where 1 - 2 / (exp(2x) + 1) would cancel; within 2 ulp of float32."""
        series = f"({x} * (1.0 + {x} * {x} * (-0.33333333 + {x} * {x} * (0.13333334 - {x} * {x} * 0.05396825))))"
        return f"tl.where(tl.abs({x}) < 0.15, {series}, 1.0 - 2.0 / (tl.exp(2.0 * {x}) + 1.0))"

    @staticmethod
    def round(x: Any) -> str:
        """To nearest, ties to even: adding 1.5 * 2**23 leaves no bits for a fraction."""
        return f"tl.where(tl.abs({x}) < 4194304.0, ({x} + 12582912.0) - 12582912.0, {x})"

    @staticmethod
    def erf(x: Any) -> str:
        """Native."""
        return f"tl.erf({x})"

    @staticmethod
    def log2(x: Any) -> str:
        """Native."""
        return f"tl.log2({x})"

    @staticmethod
    def exp2(x: Any) -> str:
        """Native."""
        return f"tl.exp2({x})"
