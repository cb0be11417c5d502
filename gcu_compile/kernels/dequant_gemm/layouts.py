"""How integer weights lie in memory, as data.

A weight of a linear layer is a matrix of codes [N, K] (N outputs, K inputs). A `Layout` says how codes share
words and how words lie in the stored tensor; `pack` and `unpack` are inverse to each other, bit for bit, for every
layout of the table. Nothing else in the project knows these facts; a new layout is one entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from gcu_compile.errors import InvalidInputError, UnknownNameError
from gcu_compile.kernels.host import pages


@dataclass(frozen=True)
class Layout:
    """One storage form of [N, K] codes.

    Attributes:
        name: as the operations' argument `layout` spells it.
        bits: of one code, 4 or 8.
        signed: codes are two's complement; otherwise they are 0 .. 2**bits - 1.
        word: dtype of the stored tensor.
        packed: the dimension whose neighbours share a word, "k" or "n".
        rows: the dimension that the stored tensor's rows run along, "k" or "n".
        order: `order[i]` is the offset, along `packed`, of the code in bits [i * bits, (i + 1) * bits).
        tile: columns (n) of a tile; 0 for none. Tiled words are [N / tile, K / per_word, tile], N rounded up.
        source: what writes or reads this form.
    """

    name: str
    bits: int
    signed: bool
    word: torch.dtype
    packed: str
    rows: str
    order: tuple[int, ...]
    tile: int = 0
    source: str = ""

    @property
    def per_word(self) -> int:
        """Codes in one word."""
        return torch.iinfo(self.word).bits // self.bits

    @property
    def midpoint(self) -> int:
        """The code that stands for 0 in a symmetric format."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        low = -(1 << (self.bits - 1)) if self.signed else 0
        return low, low + (1 << self.bits) - 1

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """Of the stored tensor for codes [n, k]; what is left over of the last word or tile is zero."""
        if self.tile:
            return (_up(n, self.tile), _up(k, self.per_word), self.tile)
        words = {"n": n, "k": k}
        words[self.packed] = _up(words[self.packed], self.per_word)
        return (words["n"], words["k"]) if self.rows == "n" else (words["k"], words["n"])


def _up(size: int, unit: int) -> int:
    return -(-size // unit)


IN_ORDER = tuple(range(8))
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
HOST_TILE = 64
CODES = 1 << 18  # so many does a thread unpack at a time while a weight is repacked

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("int8_rows", 8, True, torch.int8, "k", "n", (0,), source="a plain int8 [N, K] weight; torchao"),
        Layout("int8_columns", 8, True, torch.int8, "k", "k", (0,), source="a plain int8 [K, N] weight; torch._int_mm"),
        Layout("uint8_rows", 8, False, torch.uint8, "k", "n", (0,), source="a plain uint8 [N, K] weight"),
        Layout("uint8_columns", 8, False, torch.uint8, "k", "k", (0,), source="a plain uint8 [K, N] weight"),
        Layout("int4_rows", 4, False, torch.uint8, "k", "n", (0, 1), source="two codes a byte, low nibble first"),
        Layout("int4_rows_high", 4, False, torch.uint8, "k", "n", (1, 0), source="two codes a byte, high nibble first"),
        Layout("int4_rows_signed", 4, True, torch.uint8, "k", "n", (0, 1), source="two's complement nibbles"),
        Layout("int4_rows_i32", 4, False, torch.int32, "k", "n", IN_ORDER, source="compressed-tensors pack-quantized"),
        Layout("int8_rows_i32", 8, False, torch.int32, "k", "n", IN_ORDER[:4], source="compressed-tensors, 8 bit"),
        Layout("gptq_int4", 4, False, torch.int32, "k", "k", IN_ORDER, source="GPTQ qweight"),
        Layout("gptq_int8", 8, False, torch.int32, "k", "k", IN_ORDER[:4], source="GPTQ qweight, 8 bit"),
        Layout("awq_int4", 4, False, torch.int32, "n", "k", AWQ_ORDER, source="AutoAWQ qweight (GEMM version)"),
        Layout("host_int4", 4, False, torch.int32, "k", "k", IN_ORDER, HOST_TILE, source="kernels/host"),
        Layout("host_int8", 8, True, torch.int32, "k", "k", IN_ORDER[:4], HOST_TILE, source="kernels/host, VNNI order"),
    )
}


def get(name: str) -> Layout:
    """The layout called `name`; an unknown one is an error that lists the known."""
    if name not in LAYOUTS:
        raise UnknownNameError("weight layout", name, LAYOUTS)
    return LAYOUTS[name]


def pack(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Store `codes`.

    Args:
        codes: [N, K], any integer dtype, within `layout.range`.

    Raises:
        InvalidInputError: a code outside the range.
    """
    low, high = layout.range
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise InvalidInputError(f"layout {layout.name}: codes must be {low} .. {high}")
    n, k = codes.shape
    bits = codes.to(torch.int32) & ((1 << layout.bits) - 1)  # as bit patterns
    pad_n = layout.tile or (layout.per_word if layout.packed == "n" else 1)
    pad_k = layout.per_word if layout.packed == "k" else 1
    bits = torch.nn.functional.pad(bits, (0, -k % pad_k, 0, -n % pad_n))
    if layout.rows == "k":
        bits = bits.T
    dim = 0 if layout.packed == layout.rows else 1
    words = bits.unflatten(dim, (-1, layout.per_word)).movedim(dim + 1, 0)
    stored = words[layout.order[0]].clone()
    for place, offset in enumerate(layout.order[1:], 1):
        stored |= words[offset] << (place * layout.bits)
    if layout.word != torch.int32:
        stored = stored.to(torch.uint8).view(layout.word)
    if layout.tile:
        stored = stored.unflatten(1, (-1, layout.tile)).movedim(1, 0)
    return stored.contiguous()


def unpack(stored: torch.Tensor, layout: Layout, n: int, k: int) -> torch.Tensor:
    """The codes [n, k] (int16) of a tensor that `pack` made. Plain torch: traced, fused and run on fake tensors.

    Raises:
        InvalidInputError: `stored` has not the shape or dtype of [n, k] codes.
    """
    if tuple(stored.shape) != layout.shape(n, k) or stored.dtype != layout.word:
        raise InvalidInputError(
            f"layout {layout.name}: a weight of {n} outputs and {k} inputs is {list(layout.shape(n, k))} "
            f"{layout.word}, this one is {list(stored.shape)} {stored.dtype}"
        )
    if layout.tile:
        stored = stored.movedim(0, 1).flatten(1)
    dim = 0 if layout.packed == layout.rows else 1
    shifts = torch.tensor([layout.order.index(i) * layout.bits for i in range(layout.per_word)], dtype=torch.int32)
    words = stored.to(torch.int32).unsqueeze(-1) >> shifts.to(stored.device)
    codes = (words & ((1 << layout.bits) - 1)).to(torch.int16)
    if layout.signed:
        half = 1 << (layout.bits - 1)
        codes = (codes ^ half) - half
    codes = codes.movedim(-1, dim + 1).flatten(dim, dim + 1)
    if layout.rows == "k":
        codes = codes.T
    return codes[:n, :k]


def repack(
    stored: torch.Tensor, old: Layout, new: Layout, n: int, k: int, order: torch.Tensor | None = None
) -> torch.Tensor:
    """`stored` in layout `new`; codes change their sign convention with it (code - midpoint stays).

    Args:
        order: [K]; input `order[i]` of the old weight becomes input i. None: inputs stay.

    Where the new words hold the codes of the old ones, words are moved (and their sign bits flipped). Else codes are
    unpacked and packed again, some outputs at a time: little is in memory beside `stored` and the result.
    """
    words = _words(stored, old, k) if order is None else None
    if words is not None and _same_words(old, new) and new.rows == "k" and new.tile:
        whole = words.shape[1] // new.tile * new.tile
        moved = _room(new, n, k, words.device)
        moved[: whole // new.tile] = words[:, :whole].unflatten(1, (-1, new.tile)).movedim(1, 0)
        if whole < n:
            moved[-1] = torch.nn.functional.pad(words[:, whole:], (0, -n % new.tile))
        if old.signed != new.signed:
            moved.bitwise_xor_(_sign_bits(new.bits))
            if whole < n:
                moved[-1, :, n - whole :] = 0
        return moved
    moved = _room(new, n, k, stored.device)

    def move(begin: int, end: int) -> None:
        codes = unpack(_outputs(stored, old, begin, end), old, end - begin, k)
        if order is not None:  # along the way that the codes lie in memory
            lying = codes.stride(0) < codes.stride(1)
            codes = codes.T.index_select(0, order).T if lying else codes.index_select(1, order)
        _outputs(moved, new, begin, end).copy_(pack(codes - old.midpoint + new.midpoint, new))

    _in_blocks(move, n, k)
    return moved


def pack_blocks(codes: torch.Tensor, new: Layout) -> torch.Tensor:
    """`pack` of codes [N, K] around 0, some outputs at a time; they are moved to the midpoint of `new`."""
    n, k = codes.shape
    stored = _room(new, n, k, codes.device)

    def store(begin: int, end: int) -> None:
        _outputs(stored, new, begin, end).copy_(pack(codes[begin:end] + new.midpoint, new))

    _in_blocks(store, n, k)
    return stored


def _room(layout: Layout, n: int, k: int, device: torch.device) -> torch.Tensor:
    """Where codes [n, k] go; the host's kernels read theirs faster from large pages."""
    if layout.tile and device.type == "cpu":
        return pages.empty(layout.shape(n, k), layout.word)
    return torch.empty(layout.shape(n, k), dtype=layout.word, device=device)


def _in_blocks(work: Callable[[int, int], None], n: int, k: int) -> None:
    """`work(begin, end)` for outputs 0 .. n in pieces of about `CODES` codes, cut between tiles and words.

    A thread takes a piece at a time and computes it alone: pieces are too small for torch's own threads, which on a
    busy machine spend most of their time waiting for each other.
    """
    size = max(1, CODES // max(1, k) // HOST_TILE) * HOST_TILE
    begins = range(0, n, size)
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, max(1, len(begins))), "repack", torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(lambda begin: work(begin, min(begin + size, n)), begins):
                pass
    finally:
        torch.set_num_threads(threads)


def _outputs(stored: torch.Tensor, layout: Layout, begin: int, end: int) -> torch.Tensor:
    """The part of a stored tensor that holds outputs begin .. end; `begin` lies between tiles and words."""
    if layout.tile:
        return stored[begin // layout.tile : _up(end, layout.tile)]
    unit = layout.per_word if layout.packed == "n" else 1
    return stored.narrow(0 if layout.rows == "n" else 1, begin // unit, _up(end, unit) - begin // unit)


def _sign_bits(bits: int) -> int:
    """The word of 32 bits whose codes have only their top bit set, as a signed integer."""
    word = sum(1 << (bits * (i + 1) - 1) for i in range(32 // bits))
    return word - (1 << 32)


def _words(stored: torch.Tensor, layout: Layout, k: int) -> torch.Tensor | None:
    """[K / codes per word, N] words of 32 bits, where the layout has such."""
    if layout.packed != "k" or layout.tile:
        return None
    if layout.word != torch.int32:
        if layout.rows != "n" or k * layout.bits % 32 or layout.order != tuple(range(layout.per_word)):
            return None
        stored = stored.contiguous().view(torch.int32)  # little-endian, like every target
    return stored.T if layout.rows == "n" else stored


def _same_words(old: Layout, new: Layout) -> bool:
    """Whether both put codes into the same places of words of 32 bits, up to their sign."""
    natural = old.order == tuple(range(old.per_word)) and new.order == tuple(range(new.per_word))
    return natural and old.bits == new.bits and new.packed == "k"


def bytes_of(layout: Layout, n: int, k: int) -> int:
    """Size of the stored tensor in bytes."""
    return math.prod(layout.shape(n, k)) * torch.iinfo(layout.word).bits // 8
