"""Attention: `gcu::attention` for contiguous tensors, and the operations on a paged KV cache."""

from gcu_compile.kernels.attention import dense, mla, paged, rope, write

ATTENTION = dense.OP
PAGED_ATTENTION, PAGED_ATTENTION_INT8 = paged.OP, paged.OP_INT8
ROPE_AND_CACHE, WRITE_KV = rope.OP, write.OP
MLA_ATTENTION = mla.OP

__all__ = ["ATTENTION", "MLA_ATTENTION", "PAGED_ATTENTION", "PAGED_ATTENTION_INT8", "ROPE_AND_CACHE", "WRITE_KV"]
