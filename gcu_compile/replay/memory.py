"""What lies at the addresses of captured calls, and where a graph keeps its intermediate results."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gcu_compile.replay.capture import CannotCaptureError, KernelCall, OperationCall

LINE = 64  # bytes of a cache line: what results begin at


@dataclass(frozen=True)
class Place:
    """Where one address of a call points.

    Attributes:
        call, slot: which address, of which call.
        kind: "intermediate", "input" or "persistent".
        tensor: index among the tensors of that kind.
        offset: in bytes, from the beginning of an intermediate's storage, else from the address that the tensor had.
    """

    call: int
    slot: int
    kind: str
    tensor: int
    offset: int


class Memory:
    """Finds the tensor that an address belongs to, among tensors of some kinds that are all alive."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ranges: list[tuple[int, int, str, int]] = []

    def add(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Of tensors that share a storage, the first that was added is found."""
        for index, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            begin, size = storage.data_ptr(), storage.nbytes()
            if not size or self.find(begin):
                continue
            i = bisect.bisect(self._begins, begin)
            self._begins.insert(i, begin)
            self._ranges.insert(i, (begin, begin + size, kind, index))

    def find(self, address: int) -> tuple[int, str, int] | None:
        """(where its storage begins, kind, index), or None."""
        i = bisect.bisect(self._begins, address) - 1
        if i < 0 or address >= self._ranges[i][1]:
            return None
        begin, _, kind, index = self._ranges[i]
        return begin, kind, index


def locate(
    calls: Sequence[KernelCall | OperationCall],
    intermediates: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    persistent: Sequence[torch.Tensor],
) -> list[Place]:
    """Where each address of `calls` points. An operation may also be given other tensors: they stay as they are, and
    it keeps them.

    Args:
        intermediates: what the run allocated.
        inputs: what it was given, which lies elsewhere next time.
        persistent: what stays: weights, caches.

    Raises:
        CannotCaptureError: what a kernel is given lies in none of these; two inputs share memory, and nothing tells
            which is meant.
    """
    if len({tensor.untyped_storage().data_ptr() for tensor in inputs}) < len(inputs):
        raise CannotCaptureError("two of its inputs share memory")
    memory = Memory()
    for kind, tensors in (("intermediate", intermediates), ("input", inputs), ("persistent", persistent)):
        memory.add(kind, tensors)
    given = {"input": inputs, "persistent": persistent}
    places = []
    for i, call in enumerate(calls):
        for slot, address in zip(call.slots, call.addresses(), strict=True):
            if not address:
                continue
            found = memory.find(address)
            if found is None:
                if isinstance(call, OperationCall):
                    continue
                raise CannotCaptureError(f"{call.name} reads or writes memory of no tensor that is known to stay")
            begin, kind, index = found
            origin = begin if kind == "intermediate" else given[kind][index].data_ptr()
            places.append(Place(i, slot, kind, index, address - origin))
    return places


def plan(places: Iterable[Place], sizes: Sequence[int], pinned: set[int]) -> tuple[dict[int, int], int]:
    """Where in one workspace the intermediates lie: those whose live ranges meet lie apart.

    Args:
        places: of all calls.
        sizes: bytes of each intermediate's storage.
        pinned: intermediates that keep their own memory.

    Returns:
        intermediate -> its offset in the workspace, and the workspace's size, both in bytes.
    """
    live: dict[int, tuple[int, int]] = {}  # from the first call to the last
    for place in places:
        if place.kind == "intermediate" and place.tensor not in pinned:
            first, last = live.get(place.tensor, (place.call, place.call))
            live[place.tensor] = min(first, place.call), max(last, place.call)
    offsets: dict[int, int] = {}
    total = 0
    for tensor in sorted(live, key=lambda t: (-sizes[t], live[t])):
        first, last = live[tensor]
        beside = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if live[other][0] <= last and first <= live[other][1]
        )
        offset = 0
        for begin, end in beside:
            if offset + sizes[tensor] <= begin:
                break
            offset = max(offset, -(-end // LINE) * LINE)
        offsets[tensor], total = offset, max(total, offset + sizes[tensor])
    return offsets, total
