"""Which blocks of a paged cache a call touches: `FusedOp.touched` of the operations that have one."""

from __future__ import annotations

from typing import Any

import torch

from gcu_compile.kernels.registry import Touched

CACHES = ("k_cache", "v_cache", "k_scale_cache", "v_scale_cache")
SCALES = ("k_scale", "v_scale", "k_zero_point", "v_zero_point")


def by_slots(arguments: dict[str, Any]) -> Touched:
    """Of a write: the blocks that `slot_mapping` names."""
    slots, size = arguments["slot_mapping"], arguments["k_cache"].shape[2]
    blocks, index = torch.unique(slots.clamp(min=0) // size, return_inverse=True)
    moved = torch.where(slots < 0, slots, index * size + slots % size)
    return Touched(blocks, _paged(arguments), {"slot_mapping": moved})


def by_table(arguments: dict[str, Any]) -> Touched:
    """Of attention: the blocks of `block_table` that hold a key; entries past a sequence's end are never read."""
    table, lengths = arguments["block_table"], arguments["seq_lens"]
    size = arguments["latent_cache" if "latent_cache" in arguments else "k_cache"].shape[-2]
    held = torch.arange(table.shape[1], device=table.device) * size < lengths.unsqueeze(1)
    blocks, index = torch.unique(table[held].long(), return_inverse=True)
    moved = torch.zeros_like(table)
    moved[held] = index.to(table.dtype)
    return Touched(blocks, _paged(arguments), {"block_table": moved})


def _paged(arguments: dict[str, Any]) -> tuple[str, ...]:
    """Arguments whose first dimension is the block."""
    names = [name for name in (*CACHES, "latent_cache") if arguments.get(name) is not None]
    # Scales of attention are one per token and head where they have three dimensions.
    return (*names, *(n for n in SCALES if arguments.get(n) is not None and arguments[n].dim() == 3))
