"""How a C++ kernel's `Arguments` are handed over: packed, 8 bytes a field, at a tenth of a ctypes structure's cost."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from itertools import repeat


class Fields:
    """Names of a C++ `struct Arguments` in its order; each is a 64-bit integer, a pointer, or a double.

    Args:
        step: those that change from call to call; they come first.
        layer: the others.
        doubles, addresses: which of them are doubles, and which pointers.
    """

    def __init__(self, step: str, layer: str, doubles: tuple[str, ...] = (), addresses: str = ""):
        self.step, self.names = tuple(step.split()), (*step.split(), *layer.split())
        self.addresses = tuple(addresses.split())
        formats = ["d" if name in doubles else "q" for name in self.names]
        self._all, self._step = struct.Struct("".join(formats)), struct.Struct("".join(formats[: len(self.step)]))
        #: `pack_step(*values)`: the step's fields, all of them, in their order; `pack_layer` gives what follows them.
        self.pack_step = self._step.pack

    @property
    def size(self) -> int:
        """Bytes of all fields."""
        return self._all.size

    def offset(self, name: str) -> int:
        """Where a field begins, in bytes."""
        return 8 * self.names.index(name)

    def pack(self, values: Mapping[str, float]) -> bytes:
        """All fields; those that `values` lacks are 0 (a null pointer)."""
        return self._all.pack(*map(values.get, self.names, repeat(0)))

    def pack_layer(self, values: Mapping[str, float]) -> bytes:
        """The layer's fields; those that `values` lacks are 0."""
        return self.pack(values)[self._step.size :]

    def kept(self, values: Mapping[str, float]) -> Kept:
        """All fields, in memory that `Kept.update` writes the step's part of."""
        return Kept(self._step, self.pack(values))


class Kept:
    """Arguments of which only the step's part changes. `pointer` is what the C++ function is called with."""

    def __init__(self, step: struct.Struct, packed: bytes):
        buffer = bytearray(packed)
        self.pointer = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        self._buffer, self._pack_into = buffer, step.pack_into

    def update(self, *values: int) -> None:
        """The step's fields, all of them, in their order."""
        self._pack_into(self._buffer, 0, *values)
