"""KV slots of a step's tokens in torch operations.

vLLM computes them in a Triton kernel on 64-bit positions, which a gcu300 does not take.
"""

from __future__ import annotations

import torch

PAD_SLOT = -1


def slot_mapping(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_size: int,
    out: torch.Tensor,
) -> None:
    """Write the slot of every token of a step into `out`.

    Args:
        block_table: [requests, blocks] int32: physical block of each logical one.
        query_start_loc: [requests + 1] int32: first token of each request, then the end of the last.
        positions: [tokens] of each token in its request.
        block_size: tokens per block.
        out: [at least tokens]: slots; `PAD_SLOT` beyond the last request's end.
    """
    count, requests = positions.shape[0], query_start_loc.shape[0] - 1
    token = torch.arange(count, dtype=query_start_loc.dtype, device=positions.device)
    row = torch.searchsorted(query_start_loc[1:].contiguous(), token, right=True)
    held = row < requests
    block = torch.div(positions, block_size, rounding_mode="floor")
    physical = block_table[row.clamp(max=requests - 1), torch.where(held, block, 0)]
    slots = physical.to(out.dtype) * block_size + (positions - block * block_size).to(out.dtype)
    out.fill_(PAD_SLOT)
    out[:count] = torch.where(held, slots, PAD_SLOT)
