"""Attention: `gcu::attention` for contiguous tensors, and the operations on a paged KV cache."""

from gcu_compile.kernels.attention import dense

ATTENTION = dense.OP

__all__ = ["ATTENTION"]
