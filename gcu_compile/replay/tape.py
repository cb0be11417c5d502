"""Calls of kernels, ready to be made again for other inputs of the same form.

recorder = Recorder()
with recorder:
    output = model(*inputs)
tape = Tape(recorder, inputs, held, output)
tape.run(inputs)    # the same kernels, on the inputs' numbers of now
tape.output         # where they left the result
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gcu_compile.kernels.host import build
from gcu_compile.replay.plan import LINE, arrange, places
from gcu_compile.replay.recorder import Call, CannotRecordError, Operation, Recorder, tensors_in

# The structures of replay.cpp, field by field.
CALL, PATCH, TAPE = struct.Struct("PqPq"), struct.Struct("Pqq"), struct.Struct("PPqPPq")
ERROR_SIZE = 1024
WORD = 8


class Tape:
    """One run's calls, with addresses of inputs and of numbers that change written before each run.

    Args:
        recorder: of the run, left.
        inputs: the tensors that the run was given. Others of the same shapes, strides and dtypes may be given later.
        held: tensors that the run reads or writes and that stay where they are; the caller looks whether they do.
        output: what the run returned. Its memory is written again by every `run`.
        scratch: memory that it may share with tapes that never run at the same time.
        numbers: (call, byte in its structure) -> which of `run`'s numbers stands there.

    Attributes:
        calls: the names of the functions, in order.
        counted: how often which implementation of which fused operation runs.
        used: which of `held` the calls use.
        scratch: the memory of what is made on the way.

    Raises:
        CannotRecordError: the recorder refused; an address belongs to none of these tensors and was not made by the
            run; the output was not.
    """

    def __init__(
        self,
        recorder: Recorder,
        inputs: Sequence[torch.Tensor],
        held: Sequence[torch.Tensor],
        output: torch.Tensor,
        scratch: Scratch | None = None,
        numbers: Mapping[tuple[int, int], int] | None = None,
    ):
        if recorder.refused:
            raise CannotRecordError(recorder.refused)
        made, numbers = recorder.made, numbers or {}
        pinned = _sharing(made, output)
        if not pinned:
            raise CannotRecordError("what it returns was not made by it")
        calls = [  # addresses that are numbers of the caller's need not be known
            replace(call, at=tuple(at for at in call.at if (i, at) not in numbers)) if isinstance(call, Call) else call
            for i, call in enumerate(recorder.calls)
        ]
        where = places(calls, made, inputs, held)
        begins, size = arrange(where, [tensor.untyped_storage().nbytes() for tensor in made], pinned)
        self.output, self.counted, self.calls = output, recorder.counted, [call.name for call in calls]
        self.used = {place.tensor for place in where if place.kind == "held"}
        self.scratch, base = (scratch or Scratch()).of(size)
        self._pinned = [made[i] for i in pinned]
        self._given = 1 + max(numbers.values(), default=-1)
        arguments = Arguments(calls)
        moved: dict[int, dict[int, int]] = {}  # operation -> which of its tensors -> where in the scratch it lies
        patches = [PATCH.pack(arguments.at(i, at), number, 0) for (i, at), number in numbers.items()]
        self._fixed: dict[int, int] = {}  # inputs that operations are given -> their addresses
        for place in where:
            native = isinstance(calls[place.call], Call)
            if place.kind == "input":
                if native:
                    at = arguments.at(place.call, place.at)
                    patches.append(PATCH.pack(at, self._given + place.tensor, place.offset))
                else:
                    self._fixed[place.tensor] = inputs[place.tensor].data_ptr()
            elif place.kind == "made" and place.tensor in begins:
                at = begins[place.tensor] + place.offset
                if native:
                    ctypes.c_int64.from_address(arguments.at(place.call, place.at)).value = base + at
                else:
                    moved.setdefault(place.call, {})[place.at] = base - self.scratch.data_ptr() + at
        self._values = (ctypes.c_int64 * (self._given + len(inputs)))()
        self._error = ctypes.create_string_buffer(ERROR_SIZE)
        packed = [arguments.pack(i, call) for i, call in enumerate(calls) if isinstance(call, Call)]
        self._kept = arguments, _buffer(packed), _buffer(patches)
        calls_at, patches_at = map(ctypes.addressof, self._kept[1:])
        values_at, error_at = ctypes.addressof(self._values), ctypes.addressof(self._error)
        self._tape = TAPE.pack(calls_at, patches_at, len(patches), values_at, error_at, ERROR_SIZE)
        #: What is done, in order: so many C functions, then an operation (or none).
        self._turns: list[tuple[int, Callable[[], None] | None]] = []
        count = 0
        for i, call in enumerate(calls):
            if isinstance(call, Call):
                count += 1
            else:
                self._turns.append((count, _again(call, moved.get(i, {}), self.scratch)))
                count = 0
        self._turns.append((count, None))

    def run(self, inputs: Sequence[torch.Tensor], numbers: Sequence[int] = ()) -> str | None:
        """Make the calls; the result is in `output`.

        Args:
            inputs: as for the run that was recorded.
            numbers: what stands where `numbers` of the constructor says.

        Returns:
            None, or what kept it from the end: an input that lies elsewhere, though an operation takes it as it lay;
            which call refused its arguments or failed, and how, and those after it were not made.
        """
        given = [tensor.data_ptr() for tensor in inputs]
        for i, address in self._fixed.items():
            if given[i] != address:
                return f"input {i} lies elsewhere"
        self._values[:] = (*numbers, *given)
        replay, first = build.load("replay").gcu_replay, 0
        for count, operation in self._turns:
            if count and (failed := replay(self._tape, first, first + count)):
                error = self._error.value.decode(errors="replace")
                return f"kernel {failed}: {error or 'it refuses its arguments'}"
            first += count
            if operation is not None:
                operation()
        return None


def _again(call: Operation, moved: dict[int, int], scratch: torch.Tensor) -> Callable[[], None]:
    """A function that makes the call with tensors in their new places.

    Args:
        moved: which of the operation's tensors lie in the scratch -> where, in bytes.
    """
    tensors = list(call.tensors)
    for i, begin in moved.items():
        old = tensors[i]
        part = scratch[begin : begin + _span(old)].view(old.dtype)
        tensors[i] = part.as_strided(old.shape, old.stride())
    rest = iter(tensors)
    args, kwargs = _with(call.args, rest), {name: _with(value, rest) for name, value in call.kwargs.items()}
    function, results = call.function, list(rest)
    if not results:
        return lambda: function(*args, **kwargs)

    def run() -> None:
        new = function(*args, **kwargs)
        for old, one in zip(results, tensors_in(new), strict=True):
            old.copy_(one)

    return run


def _span(tensor: torch.Tensor) -> int:
    """Bytes from its first number to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _with(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """`value` with the next of `tensors` in the place of each tensor."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    return type(value)([_with(one, tensors) for one in value]) if isinstance(value, (list, tuple)) else value


class Arguments:
    """What the calls of a tape are called with, in one piece of memory: words of 8 bytes."""

    def __init__(self, calls: Sequence[Call | Operation]):
        given = [call.arguments if isinstance(call, Call) else () for call in calls]
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

    def at(self, call: int, place: int) -> int:
        """The address of one of the addresses that a call has, as its `at` says."""
        return self._begins[call] + (WORD + place if self._structures[call] else WORD * place)

    def pack(self, i: int, call: Call) -> bytes:
        """`struct Call` of call i."""
        count = 1 if self._structures[i] else len(call.arguments)
        return CALL.pack(call.function, count, self._begins[i], call.answers)


def _buffer(entries: Collection[bytes]) -> ctypes.Array:
    together = b"".join(entries)
    return ctypes.create_string_buffer(together, max(1, len(together)))


def _sharing(made: Sequence[torch.Tensor], output: torch.Tensor) -> set[int]:
    """Which of `made` lie in the output's memory."""
    begin = output.untyped_storage().data_ptr()
    return {i for i, tensor in enumerate(made) if tensor.untyped_storage().data_ptr() == begin}


class Scratch:
    """Memory that tapes share."""

    def __init__(self) -> None:
        self._blocks: dict[int, torch.Tensor] = {}

    def of(self, size: int) -> tuple[torch.Tensor, int]:
        """A block of at least `size` bytes, one for all of about this size, and its first cache line's address."""
        size = 1 << (size + LINE).bit_length()
        block = self._blocks.setdefault(size, torch.empty(size, dtype=torch.uint8))
        return block, -(-block.data_ptr() // LINE) * LINE
