"""Batches for the paged operations: sequences of given lengths in a shuffled cache with holes."""

from dataclasses import dataclass

import torch


@dataclass
class Case:
    """Arguments of `gcu::paged_attention` and, per sequence, the keys and values that its blocks hold."""

    arguments: dict
    keys: list[torch.Tensor]  # [kv_heads, seq_len, head_dim], dequantised
    values: list[torch.Tensor]


def quantise(x, granularity, zero):
    """int8 cache, scale and zero point of `x` [blocks, kv_heads, block_size, size]."""
    dims = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "token_head": (3,)}[granularity]
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    if zero:
        scale = (high - low) / 255
        point = (-128 - low / scale).round()
    else:
        scale, point = torch.maximum(-low, high) / 127, torch.zeros_like(low)
    stored = (x / scale + point).round().clamp(-128, 127)
    shape = {"tensor": (1,), "head": (x.shape[1],), "token_head": x.shape[:3]}[granularity]
    numbers = scale.view(shape).float()
    back = (stored - point) * numbers.double().view(scale.shape)
    return stored.to(torch.int8), numbers, point.view(shape).to(torch.int32) if zero else None, back


def case(lens, queries, *, heads=4, kv_heads=2, head_dim=32, v_dim=None, block_size=16, dtype=torch.float64,
         cache="float", zero=False, padding=0, seed=0) -> Case:  # fmt: skip
    """`lens`: keys per sequence; `queries`: the last so many of them are queries. `cache`: "float" (dtype of q), or
    the granularity of an int8 cache's scales."""
    source = torch.Generator().manual_seed(seed)
    v_dim = head_dim if v_dim is None else v_dim

    def random(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).double()

    need = [-(-n // block_size) for n in lens]
    blocks = sum(need) + 3
    order = torch.randperm(blocks, generator=source).tolist()
    table = torch.full((len(lens), max([*need, 1]) + 2), -7, dtype=torch.int32)  # holes past each sequence's end
    for i, n in enumerate(need):
        table[i, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)
    caches, scales, dense = [], {}, []
    for name, size in (("k", head_dim), ("v", v_dim)):
        x = random(blocks, kv_heads, block_size, size)
        if cache == "float":
            stored = x.to(dtype)
        else:
            stored, scale, point, x = quantise(x, cache, zero)
            scales |= {f"{name}_scale": scale, f"{name}_zero_point": point}
        caches.append(stored)
        dense.append([x[table[i, :n].long()].transpose(0, 1).flatten(1, 2)[:, : lens[i]] for i, n in enumerate(need)])
    arguments = {
        "q": random(sum(queries) + padding, heads, head_dim).to(dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "block_table": table,
        "query_start_loc": torch.tensor([0, *queries]).cumsum(0).to(torch.int32),
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "scale": head_dim**-0.5,
        **scales,
    }
    return Case(arguments, *dense)


def double(arguments: dict) -> dict:
    """The same batch with float64 queries and float caches: the reference's arguments."""
    wide = (torch.float32, torch.bfloat16, torch.float16)
    names = ("q", "k_cache", "v_cache", "alibi_slopes", "sinks")
    return {
        n: x.double() if n in names and isinstance(x, torch.Tensor) and x.dtype in wide else x
        for n, x in arguments.items()
    }
