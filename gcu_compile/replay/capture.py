"""Watches one run of a compiled model and notes what it calls."""

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
# Operations of torch that move no data, or only by others that are seen as well. Those that allocate are the two that
# are kept (`Capture._keeping`). `resolve_conj` and `resolve_neg` are not here: `numpy` and `tolist` show as them.
VIEWS = """alias as_strided broadcast_to chunk contiguous detach empty expand expand_as flatten lift_fresh narrow
new_empty permute reshape _reshape_alias reshape_as select slice split split_with_sizes squeeze t to transpose unbind
unflatten unsqueeze unsafe_chunk unsafe_split unsafe_split_with_sizes _unsafe_view view view_as"""
MOVES_NOTHING = frozenset(f"aten::{name}" for name in VIEWS.split())
# Tags of operations that say of a later call something else than of this one.
UNFIT = {
    torch.Tag.nondeterministic_seeded: "draws random numbers",
    torch.Tag.dynamic_output_shape: "returns as many numbers as its input's values say",
    torch.Tag.data_dependent_output: "returns a number",
}
_capturing = threading.Lock()  # what is patched meanwhile belongs to the process


class CannotCaptureError(Exception):
    """Why a run cannot be replayed."""


@dataclass(frozen=True)
class KernelCall:
    """One call of a C function.

    Attributes:
        name: for a reader.
        function: its address.
        arguments: integers and addresses; of a function of ours, its structure.
        slots: which arguments, or which bytes of the structure, are addresses.
        returns_status: whether what it returns must be 0.
    """

    name: str
    function: int
    arguments: tuple[int, ...] | bytes
    slots: tuple[int, ...]
    returns_status: bool = False

    def addresses(self) -> list[int]:
        """What is in the slots; 0: no tensor is given."""
        if isinstance(self.arguments, bytes):
            return [struct.unpack_from("q", self.arguments, slot)[0] for slot in self.slots]
        return [self.arguments[slot] for slot in self.slots]


@dataclass(frozen=True)
class OperationCall:
    """One call of an operation of torch's that a wrapper of Inductor's calls: it is called again from Python.

    Attributes:
        name: for a reader.
        function, args, kwargs: what was called.
        results: the tensors that it allocated and returned; those that it was given are not among them.
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
    def slots(self) -> range:
        """Numbers of its tensors."""
        return range(len(self.tensors))

    def addresses(self) -> list[int]:
        """Where its tensors begin; 0: one of no numbers."""
        return [tensor.data_ptr() for tensor in self.tensors]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors_in(one)] if isinstance(value, (list, tuple)) else []


class Capture:
    """As a context: notes what runs in this thread, of kernels and of operations that wrappers of Inductor's call.

    Args:
        python_operations: how names of operations begin that are Python, whose own operations and kernels are seen.

    Attributes:
        calls: in order.
        intermediates: the tensors that were allocated meanwhile; none is freed, so that no address means two things.
        counted: how often which implementation of which fused operation ran as a `KernelCall` (`registry.calls`).
        refused: why the run cannot be replayed, or None; known after leaving.
    """

    def __init__(self, python_operations: tuple[str, ...] = ("gcu::",)) -> None:
        self.calls: list[KernelCall | OperationCall] = []
        self.intermediates: list[torch.Tensor] = []
        self.counted: Counter = Counter()
        self.refused: str | None = None
        self.python_operations, self._thread = python_operations, threading.get_ident()
        self._inside = False  # of an operation, which will run as a whole

    def __enter__(self) -> Capture:
        self._stack = contextlib.ExitStack()
        if not _capturing.acquire(blocking=False):
            self.refuse("another run is being captured")
            return self
        self._before = registry.calls.copy()
        with contextlib.ExitStack() as stack:
            stack.callback(_capturing.release)
            stack.enter_context(mock.patch.object(build, "load", functools.partial(Library, self, build.load)))
            stack.enter_context(mock.patch.object(torch, "empty", self._keeping(torch.empty)))
            stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", self._keeping(torch.Tensor.new_empty)))
            for wrapper in generated_private.wrappers():
                patched = {name: self._generated(kernel) for name, kernel in generated_private.kernels(wrapper)}
                allocate = getattr(wrapper, generated_private.ALLOCATE)
                patched[generated_private.ALLOCATE] = self._keeping(allocate)
                for name, path in generated_private.NAMESPACES.items():
                    if hasattr(wrapper, name):
                        patched[name] = Namespace(self, getattr(wrapper, name), path)
                stack.enter_context(mock.patch.multiple(wrapper, **patched))
            self._seen = stack.enter_context(generated_private.SeenOperations())
            stack.callback(self._finish)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def _finish(self) -> None:
        self.counted = registry.calls - self._before
        names = [name for name in self._seen.stop() if not name.startswith(self.python_operations)]
        if others := [name for name in names if name not in MOVES_NOTHING]:
            self.refuse(f"it runs {', '.join(others)} where they cannot be captured")

    def refuse(self, reason: str) -> None:
        """Let this run not be replayed; the first reason counts."""
        self.refused = self.refused or reason

    def watches(self) -> bool:
        """Whether what runs now is to be noted: not another thread of the process, nor an operation's inside."""
        return threading.get_ident() == self._thread and not self._inside

    def _keeping(self, allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if self.watches():
                self.intermediates.append(tensor)
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
            slots = tuple(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
            try:
                self.calls.append(KernelCall(name, generated_private.address(kernel), numbers, slots))
            except (AttributeError, OSError) as error:  # of the library
                self.refuse(f"kernel {name}: {error}")

        return call

    def call_operation(self, name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
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
        try:
            results = self._results(name, function, result, tensors_in((args, tuple(kwargs.values()))))
        except Exception as error:  # the run itself is well: tensors without a storage, and what else there may be
            self.refuse(f"{name}: {error}")
        else:
            self.intermediates += results
            self.calls.append(OperationCall(name, function, args, kwargs, results))
        return result

    def _results(self, name: str, function: Callable, result: Any, given: list[torch.Tensor]) -> tuple:
        """The new tensors among what an operation returned."""
        tags = getattr(getattr(function, "default", function), "tags", ())
        for tag, what in UNFIT.items():
            if tag in tags:
                self.refuse(f"{name} {what}")
        if name.startswith(generated_private.COLLECTIVES):
            self.refuse(f"{name} returns before its result is there")
        returned = result if isinstance(result, (list, tuple)) else [result]
        if other := [type(one).__name__ for one in returned if one is not None and not torch.is_tensor(one)]:
            self.refuse(f"{name} returns a {other[0]}")
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        tensors = [one for one in returned if torch.is_tensor(one)]
        new = tuple(one for one in tensors if one.untyped_storage().data_ptr() not in storages)
        if new and len(new) < len(tensors):
            self.refuse(f"{name} returns both what it was given and what it allocated")
        return new


class Library:
    """A library of ours, whose functions are noted when they are called."""

    def __init__(self, capture: Capture, load: Callable[[str], ctypes.CDLL], name: str):
        self._capture, self._name, self._library = capture, name, load(name)

    def __getattr__(self, function: str) -> Callable:
        original, capture = getattr(self._library, function), self._capture
        layout = layouts().get((self._name, function))

        def call(*arguments: Any) -> Any:
            result = original(*arguments)
            if not capture.watches():
                return result
            if layout is None or len(arguments) != 1:
                capture.refuse(f"it calls {function}, whose arguments are not known")
            else:
                address = ctypes.cast(original, ctypes.c_void_p).value
                packed = layout.read(arguments[0])
                capture.calls.append(KernelCall(function, address, packed, layout.addresses, layout.returns_status))
            return result

        return call


class Namespace:
    """Something that a wrapper finds operations in, such as `torch.ops`: they are noted when they are called."""

    def __init__(self, capture: Capture, value: Any, path: str):
        self._capture, self._value, self._path = capture, value, path

    def __getattr__(self, name: str) -> Any:
        value, path = getattr(self._value, name), f"{self._path}.{name}"
        operation = generated_private.operation_at(path)
        if operation is None or operation.startswith(self._capture.python_operations):
            return value
        return Namespace(self._capture, value, path)

    def __call__(self, *args, **kwargs) -> Any:
        return self._capture.call_operation(self._path, self._value, args, kwargs)
