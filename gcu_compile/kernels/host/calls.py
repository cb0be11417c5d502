"""What our C++ functions are called with: one pointer to a structure, and where the addresses are in it.

For whoever wants to make a call again with other tensors than it was made with (`gcu_compile/replay/`).
"""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass
from typing import Any

import gcu_compile.kernels.dequant_gemm  # noqa: F401 - first: it and the modules below import each other
from gcu_compile.kernels.host import attention, dequant_gemm, int8_gemm, linear, prologues, rope
from gcu_compile.kernels.host.fields import Fields


@dataclass(frozen=True)
class Layout:
    """A function's structure.

    Attributes:
        size: bytes.
        addresses: where the pointers are, in bytes.
        returns_status: whether the function returns 0, or another number where it refuses what it was given.
    """

    size: int
    addresses: tuple[int, ...]
    returns_status: bool = False

    def read(self, argument: Any) -> bytes:
        """The structure that a function was called with: packed, in a buffer, or by reference."""
        if isinstance(argument, bytes):
            return argument[: self.size]
        return ctypes.string_at(ctypes.cast(argument, ctypes.c_void_p), self.size)


def _of_struct(packed: struct.Struct) -> Layout:
    """The layout of `struct` fields, whose pointers are the Ps."""
    format, at, addresses = packed.format, 0, []
    while at < len(format):
        end = at
        while format[end].isdigit():
            end += 1
        count, kind = int(format[at:end] or 1), format[end]
        if kind == "P":
            first = struct.calcsize(format[:at] + "P") - struct.calcsize("P")
            addresses += range(first, first + count * struct.calcsize("P"), struct.calcsize("P"))
        at = end + 1
    return Layout(packed.size, tuple(addresses))


def _of_fields(fields: Fields) -> Layout:
    return Layout(fields.size, tuple(map(fields.offset, fields.addresses)), returns_status=True)


def _of_ctypes(structure: type[ctypes.Structure]) -> Layout:
    pointers = (name for name, kind in structure._fields_ if kind is ctypes.c_void_p)
    return Layout(ctypes.sizeof(structure), tuple(getattr(structure, name).offset for name in pointers))


@functools.cache
def layouts() -> dict[tuple[str, str], Layout]:
    """(library, function) -> its layout, of the functions that a model's layers call.

    Those of experts are left out: a mixture is called again as one operation.
    """
    return {
        ("attention", "gcu_attention"): _of_fields(attention.FIELDS),
        ("rope", "gcu_rope_and_cache"): _of_fields(rope.FIELDS),
        ("linear", "gcu_linear"): _of_struct(linear.FIELDS),
        ("dequant_gemm", "gcu_dequant_gemm"): _of_struct(dequant_gemm.FIELDS),
        ("int8_gemm", "gcu_int8_gemm"): _of_struct(int8_gemm.FIELDS),
        ("int8_gemm", "gcu_quantize"): _of_ctypes(int8_gemm.Quantize),
        ("prologues", "gcu_prologue"): _of_struct(prologues.FIELDS),
    }
