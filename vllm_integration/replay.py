"""Steps of few tokens without Python: a step's calls of kernels are noted once and made again (`gcu_compile/replay/`).

    number of tokens met   1st, 2nd: as ever. 3rd: noted. 4th: made again, then as ever, and both compared, bit by bit.
                           From then on: made again.

A step's attention tables and its input tensors' addresses are read anew for each step. Weights and caches are looked at
when a request begins, for to look at hundreds of tensors takes longer than many a product; and whoever gets at the
model between steps (to load weights, to sleep, to add an adapter) makes everything be noted anew. What is not as it was
goes the usual way, and so does a step that somebody watches: a shadow check, a profiler, a mode.
"""

from __future__ import annotations

import operator
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from gcu_compile.kernels import modes_private, registry
from gcu_compile.kernels.attention.layer import NUMBERS, TABLES
from gcu_compile.options import debug_checks
from gcu_compile.replay.recorder import Call, CannotRecordError, Recorder
from gcu_compile.replay.tape import Scratch, Tape
from vllm_integration.attention import GcuAttentionImpl, Metadata
from vllm_integration.behaviours import log

MOST_TOKENS = 64  # of a step; more take so long that Python's part is small
MOST_TAPES = 64  # that are kept, the last used
MET_BEFORE = 2  # steps of as many tokens, before one is noted: layers and libraries are known then
MOST_REFUSALS = 3  # then no step of this model will do
# vLLM's operations whose Python is ours, and what they call is seen.
OURS = ("gcu::", "gcu_vllm::", "vllm::unified_attention_with_output", "vllm::unified_kv_cache_update")
PER_GROUP = len(TABLES) + 1  # `Step.numbers`


@dataclass
class Step:
    """What one step is made of, besides weights and caches.

    Attributes:
        inputs: the model's tensors.
        form: all that must be as it was.
        layers: of each group of layers that share a cache's tables, their names.
        numbers: `Step.numbers` of all groups, one after the other.
    """

    inputs: list[torch.Tensor]
    form: tuple
    layers: list[list[str]]
    numbers: list[int]


@dataclass
class Entry:
    """Where a model keeps tensors: `owner[name]`. `always`: it matters whether they are found in a tape or not."""

    owner: dict
    name: str
    tensors: list[torch.Tensor]
    always: bool = False


@dataclass
class Held:
    """Tensors that a tape uses, and where the model keeps them."""

    owners: list[dict] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        self.owners.append(entry.owner)
        self.names.append(entry.name)
        self.values.append(entry.owner[entry.name])
        self.tensors += entry.tensors
        self.addresses += [tensor.data_ptr() for tensor in entry.tensors]

    def stay(self) -> bool:
        """Whether none was replaced or moved since."""
        return (
            all(map(operator.is_, map(dict.get, self.owners, self.names), self.values))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )


@dataclass
class Known:
    """Steps of one form. `proven`: made again, one gave what the usual way gives; `looked`: what is held is there."""

    met: int = 0
    tape: Tape | None = None
    held: Held | None = None
    proven: bool = False
    looked: bool = False


class Replay:
    """In the place of a model runner's `_model_forward`, which vLLM has so that it can be replaced."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._forward = runner, runner._model_forward
        self._known: OrderedDict[tuple, Known] = OrderedDict()
        self._refusals, self._scratch = 0, Scratch()
        #: Steps that ran as tapes, and the calls of the tapes that were made.
        self.replayed, self.recorded = 0, set()

    def look_again(self) -> None:
        """Weights and caches may have been replaced: look at them before the next run."""
        for known in self._known.values():
            known.looked = False

    def forget(self) -> None:
        """The model may be another now."""
        self._known.clear()
        self._refusals = 0

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **more: Any,
    ) -> Any:
        def as_ever() -> Any:
            return self._forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)

        step = None
        if self._refusals < MOST_REFUSALS and intermediate_tensors is None and not more:
            step = read_step([input_ids, positions, inputs_embeds])
        if step is None:
            return as_ever()
        known = self._known.get(step.form)
        if known is None:
            known = self._known[step.form] = Known()
            if len(self._known) > MOST_TAPES:
                self._known.popitem(last=False)
        self._known.move_to_end(step.form)
        if known.tape is None:
            known.met += 1
            return as_ever() if known.met <= MET_BEFORE else self._record(step, known, as_ever)
        if not known.looked and not known.held.stay():
            known.tape, known.met, known.proven = None, 0, False
            return as_ever()
        known.looked = True
        if not known.proven:
            return self._prove(step, known, as_ever)
        if known.tape.run(step.inputs, step.numbers) is not None:
            return as_ever()  # which says what is wrong with the step
        registry.calls.update(known.tape.counted)
        self.replayed += 1
        return known.tape.output.clone()  # some callers keep it beyond the next step

    def _record(self, step: Step, known: Known, as_ever: Callable[[], Any]) -> Any:
        recorder = Recorder(in_python=OURS)
        with recorder:
            output = as_ever()
        try:
            if not isinstance(output, torch.Tensor):
                raise CannotRecordError(f"the model returns a {type(output).__name__}")
            context = get_forward_context()
            layers = [context.no_compile_layers[name] for names in step.layers for name in names]
            entries = [*caches_of(layers), *weights_of(self._runner.get_model())]
            tensors = [tensor for entry in entries for tensor in entry.tensors]
            numbers = numbers_in(recorder.calls, step.numbers)
            known.tape = Tape(recorder, step.inputs, tensors, output, self._scratch, numbers)
        except CannotRecordError as reason:
            self._refuse(known, str(reason))
            return output
        used = {tensors[i].data_ptr() for i in known.tape.used}
        known.held = Held()
        for entry in entries:
            if entry.always or any(tensor.data_ptr() in used for tensor in entry.tensors):
                known.held.add(entry)
        return output.clone()

    def _prove(self, step: Step, known: Known, as_ever: Callable[[], Any]) -> Any:
        known.tape.scratch.fill_(255)  # NaN: what is read must have been written
        if known.tape.run(step.inputs, step.numbers) is not None:
            return as_ever()
        mine = known.tape.output.view(torch.uint8).clone()
        output = as_ever()
        if torch.equal(mine, output.view(torch.uint8)):
            known.proven = True
            self.recorded.update(known.tape.calls)
            tokens = output.shape[0]
            log.info("Steps of %d tokens are replayed from now on: %d calls.", tokens, len(known.tape.calls))
        else:
            log.warning("A step's kernels, called again, gave other numbers than the step.")
            self._refuse(known, "their kernels, called again, gave other numbers")
        return output

    def _refuse(self, known: Known, reason: str) -> None:
        known.tape, known.met = None, 0
        self._refusals += 1
        if self._refusals == MOST_REFUSALS:
            log.info("Steps of few tokens are not replayed: %s.", reason)


def read_step(given: Sequence[torch.Tensor | None]) -> Step | None:
    """The step that runs now, with these ids, positions and embeddings; None: it is none to be replayed."""
    if registry.watcher is not None or modes_private.watched() or modes_private.profiled() or debug_checks():
        return None
    ids, _, embeddings = given
    rows = ids if ids is not None else embeddings
    context = get_forward_context()
    metadata = context.attn_metadata
    if rows is None or rows.shape[0] > MOST_TOKENS or not isinstance(metadata, dict) or context.skip_compiled:
        return None
    inputs = [tensor for tensor in given if tensor is not None]
    groups: dict[int, list[str]] = {}
    for name, tables in metadata.items():
        if type(tables) is not Metadata:
            return None
        groups.setdefault(id(tables), []).append(name)
    layers, numbers, slots = list(groups.values()), [], []
    for names in layers:
        step = metadata[names[0]].step
        if not step.native or step.slot_mapping is None:
            return None
        numbers += step.numbers()
        slots.append(step.slot_mapping.shape[0])
    forms = tuple(None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in given)
    form = (forms, tuple(map(tuple, layers)), tuple(slots), torch.get_num_threads())
    return Step(inputs, form, layers, numbers)


def caches_of(layers: Sequence[Any]) -> Iterator[Entry]:
    """What layers of attention keep: their cache, and what was made of it and of their settings."""
    for layer in layers:
        impl = layer.impl
        if not isinstance(impl, GcuAttentionImpl) or impl._layer is None or not torch.is_tensor(layer.kv_cache):
            raise CannotRecordError(f"{type(impl).__name__} keeps its cache in another way")
        yield Entry(vars(layer), "kv_cache", [layer.kv_cache], always=True)
        yield Entry(vars(impl), "_layer", impl._layer.tensors(), always=True)


def weights_of(model: torch.nn.Module) -> Iterator[Entry]:
    """A model's parameters and buffers."""
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for name, tensor in owner.items():
                if tensor is not None:
                    yield Entry(owner, name, [tensor])


def numbers_in(calls: Sequence[Call], numbers: Sequence[int]) -> dict[tuple[int, int], int]:
    """(call, byte in its structure) -> which of the step's numbers stands there."""
    found: dict[tuple[int, int], int] = {}
    for i, call in enumerate(calls):
        fields = NUMBERS.get(call.name, {})
        there = {at: struct.unpack_from("q", call.arguments, at)[0] for at in fields}
        for first in range(0, len(numbers), PER_GROUP):
            if all(there[at] == numbers[first + n] for at, n in fields.items()):
                found |= {(i, at): first + n for at, n in fields.items()}
                break
        else:
            raise CannotRecordError(f"{call.name} does not read the step's tables")
    return found
