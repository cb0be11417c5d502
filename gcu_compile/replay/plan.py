"""What lies at the addresses of recorded calls, and where a tape keeps its intermediate results."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from gcu_compile.replay.recorder import Call, CannotRecordError, Operation

LINE = 64  # bytes of a cache line: what results begin at


@dataclass(frozen=True)
class Place:
    """Where one address of a call points.

    Attributes:
        call, at: which call's, and where in it, as its `at` says.
        kind: "held", "input" or "made".
        tensor: index among the tensors of that kind.
        offset: in bytes, from the beginning of the tensor's memory ("made"), or from the address that it had.
    """

    call: int
    at: int
    kind: str
    tensor: int
    offset: int


class Memory:
    """Finds the tensor that an address belongs to, among tensors of some kinds that are all alive."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ranges: list[tuple[int, int, str, int]] = []

    def add(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Later kinds give way to earlier ones where they share memory."""
        for index, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            begin, size = storage.data_ptr(), storage.nbytes()
            if not size or self.find(begin):
                continue
            i = bisect.bisect(self._begins, begin)
            self._begins.insert(i, begin)
            self._ranges.insert(i, (begin, begin + size, kind, index))

    def find(self, address: int) -> tuple[int, str, int] | None:
        """(where its memory begins, kind, index), or None."""
        i = bisect.bisect(self._begins, address) - 1
        if i < 0 or address >= self._ranges[i][1]:
            return None
        begin, _, kind, index = self._ranges[i]
        return begin, kind, index


def places(
    calls: Sequence[Call | Operation],
    made: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
) -> list[Place]:
    """Where each address of `calls` points.

    Args:
        made: the tensors that the run allocated.
        inputs: those that it was given, which lie elsewhere next time.
        held: those that stay: weights, caches.

    Raises:
        CannotRecordError: what a C function is given lies in none of these; two inputs share memory, and nothing tells
            which is meant.
    """
    if len({tensor.untyped_storage().data_ptr() for tensor in inputs}) < len(inputs):
        raise CannotRecordError("two of its inputs share memory")
    memory = Memory()
    for kind, tensors in (("made", made), ("input", inputs), ("held", held)):
        memory.add(kind, tensors)
    given = {"input": inputs, "held": held}
    found = []
    for i, call in enumerate(calls):
        for at, address in zip(call.at, call.addresses(), strict=True):
            if not address:
                continue
            place = memory.find(address)
            if place is None and isinstance(call, Operation):
                continue  # it is called with the tensor itself, which it keeps
            if place is None:
                raise CannotRecordError(f"{call.name} reads or writes memory of no tensor that is known to stay")
            begin, kind, index = place
            origin = begin if kind == "made" else given[kind][index].data_ptr()
            found.append(Place(i, at, kind, index, address - origin))
    return found


def arrange(places: Iterable[Place], sizes: Sequence[int], pinned: set[int]) -> tuple[dict[int, int], int]:
    """Where in one block of memory the made tensors lie: those that are needed at the same time apart.

    Args:
        places: of all calls.
        sizes: bytes of each made tensor's memory.
        pinned: made tensors that keep their own memory.

    Returns:
        made tensor -> where it begins in the block, and the block's size, both in bytes.
    """
    needed: dict[int, tuple[int, int]] = {}  # from its first call to its last
    for place in places:
        if place.kind == "made" and place.tensor not in pinned:
            first, last = needed.get(place.tensor, (place.call, place.call))
            needed[place.tensor] = min(first, place.call), max(last, place.call)
    begins: dict[int, int] = {}
    total = 0
    for tensor in sorted(needed, key=lambda t: (-sizes[t], needed[t])):
        first, last = needed[tensor]
        beside = sorted(
            (begins[other], begins[other] + sizes[other])
            for other in begins
            if needed[other][0] <= last and first <= needed[other][1]
        )
        at = 0
        for begin, end in beside:
            if at + sizes[tensor] <= begin:
                break
            at = max(at, -(-end // LINE) * LINE)
        begins[tensor], total = at, max(total, at + sizes[tensor])
    return begins, total
