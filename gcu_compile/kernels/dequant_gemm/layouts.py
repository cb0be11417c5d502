"""How integer weights lie in memory, as data.

A weight of a linear layer is a matrix of codes [N, K] (N outputs, K inputs). A `Layout` says how codes share
words and how words lie in the stored tensor; `pack` and `unpack` are inverse to each other, bit for bit, for every
layout of the table. Nothing else in the project knows these facts; a new layout is one entry here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gcu_compile.errors import InvalidInputError, UnknownNameError


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
    # As bit patterns; 64 bits wide, since the top code of an int32 word reaches its sign.
    bits = codes.to(torch.int64) & ((1 << layout.bits) - 1)
    pad_n = layout.tile or (layout.per_word if layout.packed == "n" else 1)
    pad_k = layout.per_word if layout.packed == "k" else 1
    bits = torch.nn.functional.pad(bits, (0, -k % pad_k, 0, -n % pad_n))
    if layout.rows == "k":
        bits = bits.T
    dim = 0 if layout.packed == layout.rows else 1
    words = bits.unflatten(dim, (-1, layout.per_word)).movedim(dim + 1, -1)[..., list(layout.order)]
    shifts = torch.arange(layout.per_word) * layout.bits
    stored = (words << shifts).sum(-1)
    width = torch.iinfo(layout.word).bits
    if torch.iinfo(layout.word).min < 0:
        stored = torch.where(stored >= 1 << (width - 1), stored - (1 << width), stored)
    stored = stored.to(layout.word)
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


def repack(stored: torch.Tensor, old: Layout, new: Layout, n: int, k: int) -> torch.Tensor:
    """`stored` in layout `new`; codes change their sign convention with it (code - midpoint stays)."""
    words = _words(stored, old, k)
    if words is not None and _same_words(old, new) and new.rows == "k" and new.tile:
        words = torch.nn.functional.pad(words, (0, -n % new.tile))
        return words.unflatten(1, (-1, new.tile)).movedim(1, 0).contiguous()
    codes = unpack(stored, old, n, k)
    return pack(codes - old.midpoint + new.midpoint, new)


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
    """Whether both put the same codes into the same words, so that only words need to move."""
    natural = old.order == tuple(range(old.per_word)) and new.order == tuple(range(new.per_word))
    return natural and (old.bits, old.signed) == (new.bits, new.signed) and new.packed == "k"


def bytes_of(layout: Layout, n: int, k: int) -> int:
    """Size of the stored tensor in bytes."""
    return math.prod(layout.shape(n, k)) * torch.iinfo(layout.word).bits // 8
