"""Steps of few tokens without Python: a step's kernels are captured once and replayed (`gcu_compile/replay/`).

    steps of one signature   1, 2: run normally, as a warm-up. 3: captured. 4: replayed, then run normally, and the
                             results compared bit by bit. From then on: replayed; compared once more when another
                             request has begun.

Attention's tables and the inputs' addresses are read anew for each step. Weights and caches are checked when a request
begins, for to look at hundreds of tensors takes longer than many a product; whoever gets at the model between steps (to
load weights, to add an adapter) makes everything be captured anew. What is not as it was runs normally, and so does a
step that somebody watches: a shadow check, a profiler, a mode.

A step that is compared runs twice: its kernels write the same keys and values to the same slots of the cache. A model
that changes a buffer of its own at every step is refused.
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
from gcu_compile.replay.capture import CannotCaptureError, Capture, KernelCall, OperationCall
from gcu_compile.replay.graph import KernelGraph, Workspace
from vllm_integration.attention import GcuAttentionImpl, Metadata
from vllm_integration.behaviours import log

MOST_TOKENS = 64  # of a step; more take so long that Python's part is small
MOST_GRAPHS = 64  # that are kept, the last used
WARM_UPS = 2  # steps of a signature that run before one is captured: layers and libraries are known then
VALIDATIONS = 2  # steps that are compared: the next one, and one after another request has begun
MOST_REFUSALS = 3  # then no step of this model will do
# Operations in Python, whose kernels are seen. vLLM's two call our attention, and a KV connector where there is one:
# `can_replay` says no then.
PYTHON_OPERATIONS = ("gcu::", "gcu_vllm::", "vllm::unified_attention_with_output", "vllm::unified_kv_cache_update")
PER_GROUP = len(TABLES) + 1  # `attention.layer.Step.numbers`


def can_replay(vllm_config: Any) -> bool:
    """Whether all that a step does can be seen in one process: no other ranks, whose collectives must pair up, and no
    connector that moves a layer's keys and values in Python."""
    return vllm_config.parallel_config.world_size_across_dp == 1 and vllm_config.kv_transfer_config is None


@dataclass
class StepInputs:
    """One step, besides weights and caches.

    Attributes:
        inputs: the model's tensors.
        signature: all that must be equal for a captured step to be replayed.
        layers: of each group of layers that share a cache's tables, their names.
        parameters: `attention.layer.Step.numbers` of all groups, one after the other.
    """

    inputs: list[torch.Tensor]
    signature: tuple
    layers: list[list[str]]
    parameters: list[int]


@dataclass
class Entry:
    """Where a model keeps tensors: `owner[name]`. `always`: it matters whether a graph uses them or not."""

    owner: dict
    name: str
    tensors: list[torch.Tensor]
    always: bool = False


@dataclass
class Persistent:
    """Tensors that a graph uses, and where the model keeps them. Their memory is kept as long as the graph."""

    owners: list[dict] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    storages: list[torch.UntypedStorage] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        self.owners.append(entry.owner)
        self.names.append(entry.name)
        self.values.append(entry.owner[entry.name])
        self.tensors += entry.tensors
        self.addresses += [tensor.data_ptr() for tensor in entry.tensors]
        self.storages += [tensor.untyped_storage() for tensor in entry.tensors]

    def unchanged(self) -> bool:
        """Whether none was replaced or moved since."""
        return (
            all(map(operator.is_, map(dict.get, self.owners, self.names), self.values))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )


@dataclass
class CapturedStep:
    """Steps of one signature. `checked`: its weights and caches are unchanged; `validations`: equal results so far."""

    warm_ups: int = 0
    graph: KernelGraph | None = None
    persistent: Persistent | None = None
    validations: int = 0
    checked: bool = False
    due: bool = True  # a validation

    def forget(self) -> None:
        self.warm_ups, self.graph, self.persistent = 0, None, None
        self.validations, self.checked, self.due = 0, False, True


class StepReplay:
    """In the place of a model runner's `_model_forward`, which vLLM has so that it can be replaced."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._forward = runner, runner._model_forward
        self._known: OrderedDict[tuple, CapturedStep] = OrderedDict()
        self._refusals, self._wrong, self._workspace = 0, False, Workspace()
        #: Steps that were replayed, and what their graphs call.
        self.replayed, self.captured = 0, set()

    def check_again(self) -> None:
        """A request begins: weights and caches may have been replaced through a reference that somebody kept."""
        for known in self._known.values():
            known.checked, known.due = False, known.validations < VALIDATIONS

    def forget(self) -> None:
        """The model may be another now. That replay was wrong is not forgotten."""
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
        def run_normally() -> Any:
            return self._forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)

        step = None
        possible = self._refusals < MOST_REFUSALS and not self._wrong
        if possible and intermediate_tensors is None and not more:
            step = read_step(input_ids, positions, inputs_embeds)
        if step is None:
            return run_normally()
        known = self._of(step.signature)
        if known.graph is None:
            known.warm_ups += 1
            return run_normally() if known.warm_ups <= WARM_UPS else self._capture(step, known, run_normally)
        if not known.checked and (not known.persistent.unchanged() or modes_private.hooked(self._runner.get_model())):
            known.forget()
            return run_normally()
        known.checked = True
        if known.due:
            return self._validate(step, known, run_normally)
        if reason := known.graph.replay(step.inputs, step.parameters):
            log.debug("A step of %d tokens runs normally: %s.", step.inputs[0].shape[0], reason)
            return run_normally()  # which says it, where the step is at fault
        registry.calls.update(known.graph.counted)
        self.replayed += 1
        return known.graph.output.clone()  # vLLM keeps some beyond the next step

    def _of(self, signature: tuple) -> CapturedStep:
        known = self._known.setdefault(signature, CapturedStep())
        self._known.move_to_end(signature)
        if len(self._known) > MOST_GRAPHS:
            self._known.popitem(last=False)
        return known

    def _capture(self, step: StepInputs, known: CapturedStep, run_normally: Callable[[], Any]) -> Any:
        before = [(buffer, buffer.clone()) for buffer in self._runner.get_model().buffers()]
        capture = Capture(PYTHON_OPERATIONS)
        with capture:
            output = run_normally()
        try:
            if not isinstance(output, torch.Tensor):
                raise CannotCaptureError(f"the model returns a {type(output).__name__}")
            if not all(torch.equal(_bytes(buffer), _bytes(copy)) for buffer, copy in before):
                raise CannotCaptureError("the model changes one of its buffers")
            known.graph, known.persistent = self._build(capture, step, output)
        except CannotCaptureError as reason:
            self._refuse(known, str(reason))
            return output
        except Exception as error:  # the step is well: sparse weights, and what else there may be
            self._refuse(known, f"{type(error).__name__}: {error}")
            return output
        return output.clone()

    def _build(self, capture: Capture, step: StepInputs, output: torch.Tensor) -> tuple[KernelGraph, Persistent]:
        model, context = self._runner.get_model(), get_forward_context()
        if modes_private.hooked(model):
            raise CannotCaptureError("a hook of one of its modules wants to see each step")
        layers = [context.no_compile_layers[name] for names in step.layers for name in names]
        entries = [*caches_of(layers), *weights_of(model)]
        tensors = [tensor for entry in entries for tensor in entry.tensors]
        parameters, count = find_parameters(capture.calls, step.parameters), len(step.parameters)
        graph = KernelGraph(capture, step.inputs, tensors, output, self._workspace, parameters, count)
        used = {tensors[i].untyped_storage().data_ptr() for i in graph.used}
        persistent = Persistent()
        for entry in entries:
            if entry.always or any(tensor.untyped_storage().data_ptr() in used for tensor in entry.tensors):
                persistent.add(entry)
        return graph, persistent

    def _validate(self, step: StepInputs, known: CapturedStep, run_normally: Callable[[], Any]) -> Any:
        known.graph.poison()
        if reason := known.graph.replay(step.inputs, step.parameters):
            self._refuse(known, reason)
            return run_normally()
        replayed = _bytes(known.graph.output).clone()
        output = run_normally()
        if not torch.equal(replayed, _bytes(output)):
            log.warning("A step's kernels, called again, gave other numbers than the step. Please report the model.")
            self._refuse(known, "their kernels, called again, gave other numbers", for_good=True)
            return output
        if not known.validations:
            self.captured.update(known.graph.calls)
            log.info("Steps of %d tokens are replayed: %d calls.", output.shape[0], len(known.graph.calls))
        known.validations += 1
        known.due = False
        return output

    def _refuse(self, known: CapturedStep, reason: str, for_good: bool = False) -> None:
        known.forget()
        self._refusals += 1
        self._wrong = self._wrong or for_good
        if self._refusals == MOST_REFUSALS or for_good:
            self._known.clear()
            log.info("Steps of few tokens are not replayed: %s.", reason)


def read_step(
    input_ids: torch.Tensor | None, positions: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> StepInputs | None:
    """The step that runs now; None: it is none to be replayed."""
    if registry.watcher is not None or modes_private.watched() or modes_private.profiled() or debug_checks():
        return None
    rows = input_ids if input_ids is not None else inputs_embeds
    context = get_forward_context()
    metadata = context.attn_metadata
    if rows is None or rows.shape[0] > MOST_TOKENS or not isinstance(metadata, dict) or context.skip_compiled:
        return None
    groups: dict[int, list[str]] = {}
    for name, tables in metadata.items():
        if type(tables) is not Metadata:
            return None
        groups.setdefault(id(tables), []).append(name)
    layers, parameters, slots = list(groups.values()), [], []
    for names in layers:
        step = metadata[names[0]].step
        if not step.native or step.slot_mapping is None:
            return None
        parameters += step.numbers()
        slots.append(step.slot_mapping.shape[0])
    given = (input_ids, positions, inputs_embeds)
    forms = tuple(None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in given)
    signature = (forms, tuple(map(tuple, layers)), tuple(slots), torch.get_num_threads())
    return StepInputs([x for x in given if x is not None], signature, layers, parameters)


def caches_of(layers: Sequence[Any]) -> Iterator[Entry]:
    """What layers of attention keep: their cache, and what was made of it and of their settings."""
    for layer in layers:
        impl = layer.impl
        if not isinstance(impl, GcuAttentionImpl) or impl._layer is None or not torch.is_tensor(layer.kv_cache):
            raise CannotCaptureError(f"{type(impl).__name__} keeps its cache in another way")
        yield Entry(vars(layer), "kv_cache", [layer.kv_cache], always=True)
        yield Entry(vars(impl), "_layer", impl._layer.tensors(), always=True)


def weights_of(model: torch.nn.Module) -> Iterator[Entry]:
    """A model's parameters, buffers, and tensors that are plain attributes."""
    for module in model.modules():
        for owner in (module._parameters, module._buffers, vars(module)):
            for name, tensor in owner.items():
                if isinstance(tensor, torch.Tensor):
                    yield Entry(owner, name, [tensor])


def find_parameters(
    calls: Sequence[KernelCall | OperationCall], parameters: Sequence[int]
) -> dict[tuple[int, int], int]:
    """(call, byte in its structure) -> which of a step's parameters stands there."""
    found: dict[tuple[int, int], int] = {}
    for i, call in enumerate(calls):
        if call.name not in NUMBERS:
            continue
        fields = NUMBERS[call.name]
        values = {slot: struct.unpack_from("q", call.arguments, slot)[0] for slot in fields}
        groups = range(0, len(parameters), PER_GROUP)
        first = next((g for g in groups if all(values[s] == parameters[g + n] for s, n in fields.items())), None)
        if first is None:
            raise CannotCaptureError(f"{call.name} does not read the step's tables")
        found |= {(i, slot): first + n for slot, n in fields.items()}
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its numbers, so that NaN equals NaN and 0 is not -0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
