"""Captured calls, ready to be made again for other inputs of the same form.

    with Capture() as capture:
        output = model(*inputs)
    graph = KernelGraph(capture, inputs, weights, output)
    graph.replay(inputs)    # the same kernels, on the inputs' numbers of now
    graph.output            # where they left the result
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gcu_compile.kernels.host import build
from gcu_compile.replay.capture import CannotCaptureError, Capture, KernelCall, OperationCall, tensors_in
from gcu_compile.replay.memory import LINE, Place, locate, plan

# The structures of replay.cpp, field by field.
CALL, PATCH, GRAPH = struct.Struct("PqPq"), struct.Struct("Pqq"), struct.Struct("PPqPPq")
ERROR_SIZE = 1024
WORD = 8
POISON = 255  # a float of such bytes is NaN


class KernelGraph:
    """One run's calls. What changes from run to run is written before each: addresses of inputs, and parameters.

    Args:
        capture: of the run, left.
        inputs: the tensors that the run was given. Others of the same shapes, strides and dtypes may be given later;
            those that an operation takes must lie where they lay.
        persistent: tensors that the run reads or writes and that stay where they are; the caller looks whether they do.
        output: what the run returned. Its memory is written again by every `replay`.
        workspace: memory for intermediate results, shared with graphs that are never replayed at the same time.
        parameters: (call, byte in its structure) -> which of `replay`'s parameters stands there.
        parameter_count: how many `replay` is given; some may stand nowhere.

    Attributes:
        calls: the names of the functions, in order.
        counted: how often which implementation of which fused operation runs.
        used: which of `persistent` the calls use.

    Raises:
        CannotCaptureError: the capture refused; an address belongs to none of these tensors and to no intermediate;
            the output is no intermediate.
    """

    def __init__(
        self,
        capture: Capture,
        inputs: Sequence[torch.Tensor],
        persistent: Sequence[torch.Tensor],
        output: torch.Tensor,
        workspace: Workspace | None = None,
        parameters: Mapping[tuple[int, int], int] | None = None,
        parameter_count: int = 0,
    ):
        if capture.refused:
            raise CannotCaptureError(capture.refused)
        intermediates, parameters = capture.intermediates, parameters or {}
        self._outputs = [x for x in intermediates if _storage(x) == _storage(output)]
        if not self._outputs:
            raise CannotCaptureError("what it returns was there before")
        pinned = {i for i, x in enumerate(intermediates) if _storage(x) == _storage(output)}
        calls = [_without(call, i, parameters) for i, call in enumerate(capture.calls)]
        places = locate(calls, intermediates, inputs, persistent)
        offsets, size = plan(places, [x.untyped_storage().nbytes() for x in intermediates], pinned)
        self.output, self.counted, self.calls = output, capture.counted, [call.name for call in calls]
        self.used = {place.tensor for place in places if place.kind == "persistent"}
        self._block = (workspace or Workspace()).of(size)
        self._parameter_count = parameter_count
        self._kernels = [call.name for call in calls if isinstance(call, KernelCall)]
        moved = [place for place in places if place.kind == "intermediate" and place.tensor in offsets]
        at = {(place.call, place.slot): offsets[place.tensor] + place.offset for place in moved}
        self._prepare_kernels(calls, places, at, parameters, len(inputs))
        self._prepare_turns(calls, at)
        #: Inputs that operations take as they lay -> their addresses.
        self._fixed = {
            place.tensor: inputs[place.tensor].data_ptr()
            for place in places
            if place.kind == "input" and isinstance(calls[place.call], OperationCall)
        }

    def _prepare_kernels(
        self,
        calls: list[KernelCall | OperationCall],
        places: list[Place],
        at: dict[tuple[int, int], int],
        parameters: Mapping[tuple[int, int], int],
        input_count: int,
    ) -> None:
        """What replay.cpp reads. `at`: (call, slot) -> the offset in the workspace of what lies there."""
        arguments = Arguments(calls)
        for (call, slot), offset in at.items():
            if isinstance(calls[call], KernelCall):
                arguments.write(call, slot, self._block.data_ptr() + offset)
        patches = [PATCH.pack(arguments.address(*where), number, 0) for where, number in parameters.items()]
        for place in places:
            if place.kind == "input" and isinstance(calls[place.call], KernelCall):
                number = self._parameter_count + place.tensor
                patches.append(PATCH.pack(arguments.address(place.call, place.slot), number, place.offset))
        packed = [arguments.pack(i, call) for i, call in enumerate(calls) if isinstance(call, KernelCall)]
        self._values = (ctypes.c_int64 * (self._parameter_count + input_count))()
        self._error = ctypes.create_string_buffer(ERROR_SIZE)
        self._kept = arguments, _buffer(packed), _buffer(patches)
        first, second = map(ctypes.addressof, self._kept[1:])
        values, error = ctypes.addressof(self._values), ctypes.addressof(self._error)
        self._graph = GRAPH.pack(first, second, len(patches), values, error, ERROR_SIZE)

    def _prepare_turns(self, calls: list[KernelCall | OperationCall], at: dict[tuple[int, int], int]) -> None:
        """What is done, in order: so many kernels, then an operation."""
        self._turns: list[tuple[int, Callable[[], None] | None]] = []
        kernels = 0
        for i, call in enumerate(calls):
            if isinstance(call, KernelCall):
                kernels += 1
                continue
            places = {slot: offset for (other, slot), offset in at.items() if other == i}
            self._turns.append((kernels, _again(call, places, self._block)))
            kernels = 0
        self._turns.append((kernels, None))

    def replay(self, inputs: Sequence[torch.Tensor], parameters: Sequence[int] = ()) -> str | None:
        """Make the calls; the result is in `output`.

        Args:
            inputs: as for the run that was captured.
            parameters: what stands where `parameters` of the constructor says.

        Returns:
            None, or what kept it from the end; the calls after that were not made.
        """
        given = [tensor.data_ptr() for tensor in inputs]
        for i, address in self._fixed.items():
            if given[i] != address:
                return f"input {i} lies elsewhere"
        self._values[:] = (*parameters, *given)
        replay, first = build.load("replay").gcu_replay, 0
        for kernels, operation in self._turns:
            if kernels and (failed := replay(self._graph, first, first + kernels)):
                error = self._error.value.decode(errors="replace")
                return f"{self._kernels[failed - 1]}: {error or 'it refuses its arguments'}"
            first += kernels
            if operation is not None:
                try:
                    operation()
                except Exception as error:  # whoever runs the step in another way meets it again
                    return f"{type(error).__name__}: {error}"
        return None

    def poison(self) -> None:
        """Let all that a replay must write before it reads it be NaN, and the output of the last one too."""
        self._block.fill_(POISON)
        for output in self._outputs:
            output.untyped_storage().fill_(POISON)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _without(call: KernelCall | OperationCall, i: int, parameters: Collection[tuple[int, int]]) -> Any:
    """Call i; an address that is a parameter need not belong to a tensor."""
    if isinstance(call, OperationCall):
        return call
    return replace(call, slots=tuple(slot for slot in call.slots if (i, slot) not in parameters))


def _again(call: OperationCall, offsets: dict[int, int], block: torch.Tensor) -> Callable[[], None]:
    """A function that makes the call with tensors in their new places.

    Args:
        offsets: which of the operation's tensors lie in `block` -> where, in bytes.
    """
    tensors = list(call.tensors)
    for slot, offset in offsets.items():
        old = tensors[slot]
        part = block[offset : offset + _span(old)].view(old.dtype)
        tensors[slot] = part.as_strided(old.shape, old.stride())
    rest = iter(tensors)
    args, kwargs = _with(call.args, rest), {name: _with(value, rest) for name, value in call.kwargs.items()}
    # Not `call` itself, which holds the tensors of the captured run.
    name, function, results = call.name, call.function, list(rest)

    def run() -> None:
        new = function(*args, **kwargs)
        for old, one in zip(results, tensors_in(new) if results else (), strict=True):
            if one.shape != old.shape:
                raise RuntimeError(f"{name} returns {tuple(one.shape)}, and once returned {tuple(old.shape)}")
            old.copy_(one)

    return run


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first number to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _with(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """`value` with the next of `tensors` in the place of each tensor."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if not isinstance(value, (list, tuple)):
        return value
    parts = [_with(one, tensors) for one in value]
    return parts if isinstance(value, list) else tuple(parts)


class Arguments:
    """What the kernels of a graph are called with, in one piece of memory: words of 8 bytes."""

    def __init__(self, calls: Sequence[KernelCall | OperationCall]):
        given = [call.arguments if isinstance(call, KernelCall) else () for call in calls]
        # A function of ours has one argument: the address of its structure, which follows it.
        self._structures = [isinstance(arguments, bytes) for arguments in given]
        sizes = [
            1 + -(-len(arguments) // WORD) if structure else len(arguments)
            for arguments, structure in zip(given, self._structures, strict=True)
        ]
        self._words = (ctypes.c_int64 * sum(sizes))()
        self._begins, begin = [], ctypes.addressof(self._words)
        for size, arguments, structure in zip(sizes, given, self._structures, strict=True):
            self._begins.append(begin)
            content = arguments if structure else struct.pack(f"{size}q", *arguments)
            if structure:
                ctypes.c_int64.from_address(begin).value = begin + WORD
            ctypes.memmove(begin + WORD * structure, content, len(content))
            begin += WORD * size

    def address(self, call: int, slot: int) -> int:
        """Where one slot of a call is."""
        return self._begins[call] + (WORD + slot if self._structures[call] else WORD * slot)

    def write(self, call: int, slot: int, value: int) -> None:
        """Fill a slot."""
        ctypes.c_int64.from_address(self.address(call, slot)).value = value

    def pack(self, i: int, call: KernelCall) -> bytes:
        """`struct Call` of call i."""
        count = 1 if self._structures[i] else len(call.arguments)
        return CALL.pack(call.function, count, self._begins[i], call.returns_status)


def _buffer(entries: Collection[bytes]) -> ctypes.Array:
    together = b"".join(entries)
    return ctypes.create_string_buffer(together, max(1, len(together)))


class Workspace:
    """Memory that graphs share."""

    def __init__(self) -> None:
        self._blocks: dict[int, torch.Tensor] = {}

    def of(self, size: int) -> torch.Tensor:
        """A block of at least `size` bytes on a cache line, one for all of about this size."""
        size = 1 << max(size, 1).bit_length()
        if size not in self._blocks:
            room = torch.empty(size + LINE, dtype=torch.uint8)
            begin = -room.data_ptr() % LINE
            self._blocks[size] = room[begin : begin + size]
        return self._blocks[size]
