"""Watches one run of a compiled model and notes the calls of its kernels."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.calls import layouts
from gcu_compile.replay import generated_private

MOST_ARGUMENTS = 32  # of an Inductor kernel; as in replay.cpp
# Operations of torch that move no data, or only by others that are seen as well. What one makes is looked at where a
# kernel gets it.
VIEWS = """alias as_strided broadcast_to chunk contiguous detach empty empty_like empty_strided expand expand_as flatten
lift_fresh narrow new_empty new_empty_strided numpy_T permute reshape _reshape_alias reshape_as resolve_conj resolve_neg
select slice split split_with_sizes squeeze t to transpose unbind unflatten unsqueeze unsafe_chunk unsafe_split
unsafe_split_with_sizes _unsafe_view view view_as"""
MOVES_NOTHING = frozenset(f"aten::{name}" for name in VIEWS.split())


class CannotRecordError(Exception):
    """Why a run cannot become a tape."""


@dataclass(frozen=True)
class Call:
    """One call of a C function.

    Attributes:
        name: for a reader.
        function: its address.
        arguments: integers and addresses; of a function of ours, its structure.
        at: which arguments, or which bytes of the structure, are addresses.
        answers: whether what it returns must be 0.
    """

    name: str
    function: int
    arguments: tuple[int, ...] | bytes
    at: tuple[int, ...]
    answers: bool = False

    def addresses(self) -> list[int]:
        """The addresses, in the order of `at`; 0: none is given."""
        if isinstance(self.arguments, bytes):
            return [struct.unpack_from("q", self.arguments, at)[0] for at in self.at]
        return [self.arguments[i] for i in self.at]


@dataclass(frozen=True)
class Operation:
    """One call of an operation of torch's that a wrapper calls between kernels; it is called again from Python.

    Attributes:
        name: for a reader.
        function, args, kwargs: what was called.
        results: the tensors that it made and returned; those that it was given are not among them.
    """

    name: str
    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    results: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it is given and returns."""
        return [*tensors_in((self.args, tuple(self.kwargs.values()))), *self.results]

    @property
    def at(self) -> range:
        return range(len(self.tensors))

    def addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.tensors]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors_in(one)] if isinstance(value, (list, tuple)) else []


class Recorder:
    """As a context: notes what runs in this thread, of kernels and of operations that wrappers of Inductor's call.

    Args:
        in_python: how names of operations begin that are Python, whose own operations and kernels are seen.

    Attributes:
        calls: in order.
        made: the tensors that were allocated meanwhile; none is freed, so that no address means two things.
        counted: how often which implementation of which fused operation ran in `Call`s (`registry.calls`).
        refused: why the run cannot become a tape, or None; known after leaving.
    """

    def __init__(self, in_python: tuple[str, ...] = ("gcu::",)) -> None:
        self.calls: list[Call | Operation] = []
        self.made: list[torch.Tensor] = []
        self.counted: Counter = Counter()
        self.refused: str | None = None
        self.in_python, self._thread = in_python, threading.get_ident()
        self._inside = False  # of an operation, which will run as a whole

    def __enter__(self) -> Recorder:
        self._before = registry.calls.copy()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(build, "load", functools.partial(Library, self, build.load)))
            stack.enter_context(mock.patch.object(torch, "empty", self._keeping(torch.empty)))
            stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", self._keeping(torch.Tensor.new_empty)))
            for wrapper in generated_private.wrappers():
                patched = {name: self._generated(kernel) for name, kernel in generated_private.kernels(wrapper)}
                allocate = getattr(wrapper, generated_private.ALLOCATE)
                patched[generated_private.ALLOCATE] = self._keeping(allocate)
                for name, owner in generated_private.owners_of_operations(wrapper):
                    patched[name] = Owner(self, owner, generated_private.OWNERS[name])
                stack.enter_context(mock.patch.multiple(wrapper, **patched))
            self._seen = stack.enter_context(generated_private.SeenOperations())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
        self.counted += registry.calls - self._before
        seen = [name for name in self._seen.names if not name.startswith(self.in_python)]
        if others := [name for name in seen if name not in MOVES_NOTHING]:
            self.refuse(f"it runs {', '.join(others)} where it cannot be noted")

    def refuse(self, reason: str) -> None:
        """Let this run not become a tape; the first reason counts."""
        self.refused = self.refused or reason

    def watches(self) -> bool:
        """Whether what runs now is to be noted: not another thread of the process, nor an operation's inside."""
        return threading.get_ident() == self._thread and not self._inside

    def _keeping(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if self.watches():
                self.made.append(tensor)
            return tensor

        return call

    def _generated(self, kernel: Callable) -> Callable:
        """A kernel of Inductor's, noted."""

        def call(*args):
            kernel(*args)
            if not self.watches():
                return
            name = kernel.__self__.__name__
            if len(args) > MOST_ARGUMENTS:
                return self.refuse(f"kernel {name} has {len(args)} arguments; {MOST_ARGUMENTS} are possible")
            if other := [type(a).__name__ for a in args if not isinstance(a, (torch.Tensor, int))]:
                return self.refuse(f"kernel {name} takes a {other[0]}")
            numbers = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else int(a) for a in args)
            at = tuple(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
            self.calls.append(Call(name, generated_private.address(kernel), numbers, at))

        return call

    def operate(self, name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call an operation and note it."""
        if not self.watches():
            return function(*args, **kwargs)
        self._inside, counted = True, registry.calls.copy()
        try:
            with self._seen.paused():
                result = function(*args, **kwargs)
        finally:
            self._inside = False
            self._before += registry.calls - counted  # it counts itself when it runs again
        returned = result if isinstance(result, (list, tuple)) else [result]
        if torch.Tag.nondeterministic_seeded in getattr(function, "tags", ()):
            self.refuse(f"{name} draws random numbers")
        if other := [type(one).__name__ for one in returned if one is not None and not torch.is_tensor(one)]:
            self.refuse(f"{name} returns a {other[0]}")
        given = {x.untyped_storage().data_ptr() for x in tensors_in((args, tuple(kwargs.values())))}
        results = [one for one in returned if torch.is_tensor(one)]
        new = tuple(x for x in results if x.untyped_storage().data_ptr() not in given)
        if new and len(new) < len(results):
            self.refuse(f"{name} returns both what it was given and what it made")
        self.made += new
        self.calls.append(Operation(name, function, args, kwargs, new))
        return result


class Library:
    """A library of ours, whose functions are noted when they are called."""

    def __init__(self, recorder: Recorder, load: Callable[[str], ctypes.CDLL], name: str):
        self._recorder, self._name, self._library = recorder, name, load(name)

    def __getattr__(self, function: str) -> Callable:
        original, recorder = getattr(self._library, function), self._recorder
        layout = layouts().get((self._name, function))

        def call(*arguments: Any) -> Any:
            result = original(*arguments)
            if not recorder.watches():
                return result
            if layout is None or len(arguments) != 1:
                recorder.refuse(f"it calls {function}, which is not among the functions that can be called again")
            else:
                address = ctypes.cast(original, ctypes.c_void_p).value
                packed = layout.read(arguments[0])
                recorder.calls.append(Call(function, address, packed, layout.addresses, layout.answers))
            return result

        return call


class Owner:
    """Something that a wrapper finds operations in, such as `torch.ops`: they are noted when they are called."""

    def __init__(self, recorder: Recorder, owner: Any, path: str):
        self._recorder, self._owner, self._path = recorder, owner, path

    def __getattr__(self, name: str) -> Any:
        value, path = getattr(self._owner, name), f"{self._path}.{name}"
        operation = generated_private.operation(path)
        if operation is None or operation.startswith(self._recorder.in_python):
            return value
        return Owner(self._recorder, value, path)

    def __call__(self, *args, **kwargs) -> Any:
        return self._recorder.operate(self._path, self._owner, args, kwargs)
