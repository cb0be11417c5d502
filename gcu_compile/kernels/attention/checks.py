"""Checks shared by the attention operations. Each error names operation, argument, what it is and what is expected.

Shapes and dtypes are checked on every call. Values (tables, lengths, slots) live on the device: the host kernels check
what they read as they go; elsewhere option `debug_checks` turns `paged_values` and `slot_values` on.
"""

from __future__ import annotations

import torch

from gcu_compile.errors import InvalidInputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CACHE_DTYPES = (*FLOATS, torch.int8)
BLOCK_SIZES = "a power of two from 1 to 256"


def invalid(op: str, argument: str, is_: object, expected: str) -> InvalidInputError:
    """The error for one bad argument."""
    if isinstance(is_, torch.Size):
        is_ = tuple(is_)
    return InvalidInputError(f"gcu::{op}: {argument} is {is_}, expected {expected}")


def is_fake(*tensors: torch.Tensor) -> bool:
    """Whether one of `tensors` has no values; sizes may be symbols then, and are not compared."""
    return any(isinstance(x, torch._subclasses.FakeTensor) for x in tensors)


def numbers(op: str, window: int | None, soft_cap: float) -> None:
    """A window is at least 1, a soft cap at least 0."""
    if window is not None and window < 1:
        raise invalid(op, "window", window, "at least 1, or None for no window")
    if not soft_cap >= 0:
        raise invalid(op, "soft_cap", soft_cap, "0 (off) or more")


def per_head(op: str, heads: int, **tensors: torch.Tensor | None) -> None:
    """Each of `tensors` has one number per query head."""
    for name, x in tensors.items():
        if x is not None and x.shape != (heads,):
            raise invalid(op, name, x.shape, f"[{heads}], one number per query head")


def cache(op: str, name: str, x: torch.Tensor) -> None:
    """`x` is a KV cache [num_blocks, kv_heads, block_size, size] of a known dtype and block size."""
    if x.dim() != 4:
        raise invalid(op, name, x.shape, "[num_blocks, kv_heads, block_size, size]")
    block_size = x.shape[2]
    if not 1 <= block_size <= 256 or block_size & (block_size - 1):
        raise invalid(op, f"{name}'s block size", block_size, BLOCK_SIZES)
    if x.dtype not in CACHE_DTYPES:
        raise invalid(op, f"{name}'s dtype", x.dtype, f"one of {', '.join(map(str, CACHE_DTYPES))}")
    # On a card keys may lie [head_dim, block_size]: `kernels.triton.paged_attention.key_cache`.
    keys_innermost = x.device.type != "cpu" and name == "k_cache" and x.stride(2) == 1
    if x.shape[3] and x.stride(3) != 1 and not keys_innermost:
        raise invalid(op, f"{name}'s last stride", x.stride(3), "1: the values of one head of one token are adjacent")


def scales(op: str, name: str, of: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> None:
    """Scale and zero point of cache `of`: one number, [kv_heads], or [num_blocks, kv_heads, block_size]."""
    if of.dtype == torch.int8 and scale is None:
        raise invalid(op, f"{name}_scale", None, "a tensor: an int8 cache has no meaning without its scale")
    if of.dtype != torch.int8 and (scale is not None or zero is not None):
        raise invalid(op, f"{name}_cache's dtype", of.dtype, "torch.int8, since a scale or a zero point is given")
    if scale is None:
        return
    shapes = [(), (1,), (of.shape[1],), tuple(of.shape[:3])]
    if tuple(scale.shape) not in shapes:
        raise invalid(op, f"{name}_scale", scale.shape, " or ".join(map(str, shapes)))
    if zero is not None and (zero.shape != scale.shape or zero.dtype != torch.int32):
        is_ = f"{zero.dtype} {tuple(zero.shape)}"
        raise invalid(op, f"{name}_zero_point", is_, f"torch.int32 {tuple(scale.shape)}")


def paged_layout(op: str, block_table, query_start_loc, seq_lens) -> None:
    """Shapes and dtypes of the tables of a batch."""
    sequences = seq_lens.shape[0] if seq_lens.dim() == 1 else -1
    if sequences < 0:
        raise invalid(op, "seq_lens", seq_lens.shape, "[sequences]")
    if query_start_loc.shape != (sequences + 1,):
        raise invalid(op, "query_start_loc", query_start_loc.shape, f"[{sequences + 1}]")
    if block_table.dim() != 2 or block_table.shape[0] != sequences:
        raise invalid(op, "block_table", block_table.shape, f"[{sequences}, blocks]")
    for name, x in (("block_table", block_table), ("query_start_loc", query_start_loc), ("seq_lens", seq_lens)):
        if x.dtype != torch.int32:
            raise invalid(op, f"{name}'s dtype", x.dtype, "torch.int32")


def paged_values(op, tokens, num_blocks, block_size, block_table, query_start_loc, seq_lens, causal, window) -> None:
    """Lengths and the table entries that the batch reads. Copies the tables to the CPU."""
    starts, lens, table = query_start_loc.tolist(), seq_lens.tolist(), block_table.tolist()
    if starts[0] < 0 or any(b < a for a, b in zip(starts, starts[1:], strict=False)) or starts[-1] > tokens:
        raise invalid(op, "query_start_loc", starts, f"numbers from 0 to {tokens} that do not descend")
    for i, length in enumerate(lens):
        queries = starts[i + 1] - starts[i]
        if length < 0 or (causal and queries and length < queries):
            raise invalid(op, f"seq_lens[{i}]", length, f"at least the sequence's {queries} queries, and not negative")
        if length > len(table[i]) * block_size:
            raise invalid(op, f"seq_lens[{i}]", length, f"at most {len(table[i])} blocks of {block_size}")
        first = 0 if window is None else max(0, length - queries - window + 1)
        for j in range(first // block_size, -(-length // block_size) if queries else 0):
            if not 0 <= table[i][j] < num_blocks:
                raise invalid(op, f"block_table[{i}][{j}]", table[i][j], f"a block from 0 to {num_blocks - 1}")


def slot_values(op: str, slot_mapping: torch.Tensor, slots: int) -> None:
    """Slots are -1 or in the cache, and no slot is written twice. Copies the slots to the CPU."""
    for token, slot in enumerate(slot_mapping.tolist()):
        if not -1 <= slot < slots:
            raise invalid(op, f"slot_mapping[{token}]", slot, f"-1 (not written) or a slot from 0 to {slots - 1}")
    used = slot_mapping[slot_mapping >= 0]
    if used.unique().numel() != used.numel():
        raise invalid(op, "slot_mapping", "one slot for two tokens", "each once: writes have no order")
