"""From a model or function on FakeTensors to Inductor's source for the device; nothing is loaded and nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._dynamo.exc import Unsupported
from torch._inductor import config, ir
from torch._inductor.codegen.common import get_scheduling_for_device, register_backend_for_device
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from gcu_compile.codegen import device
from gcu_compile.codegen.device_private import forced_options
from gcu_compile.errors import UnsupportedFeatureError


def fake_mode() -> torch._subclasses.FakeTensorMode:
    """Where models for the device are built and captured."""
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)


class _Stopped(BaseException):
    """Raised where the compiled code would run."""


def capture(call: Callable[..., Any], arguments: dict[str, Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Dynamo's one graph of `call(**arguments)`, and its inputs.

    Raises:
        UnsupportedFeatureError: the code breaks the graph; says where.
    """
    found: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append((gm, inputs))

        def stop(*_: Any) -> Any:
            raise _Stopped

        return stop

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(**arguments)
    except _Stopped:
        pass
    except Unsupported as error:
        raise UnsupportedFeatureError(f"the model cannot be captured as one graph: {error}") from error
    _scalars_without_storage(found[0][0])
    return found[0]


def _scalars_without_storage(gm: torch.fx.GraphModule) -> None:
    """`torch.tensor(number)`, or of an empty list (a cache that grows), copies from the CPU to the device, which a
    device of FakeTensors cannot; `full` and `empty` can."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.tensor):
        if len(node.args) != 1:
            continue
        if isinstance(node.args[0], (list, tuple)) and not node.args[0]:
            node.target, node.args = torch.empty, ((0,),)
        elif isinstance(node.args[0], (bool, int, float)):
            kwargs = {"dtype": _dtype_of(node.args[0]), **node.kwargs}
            node.target, node.args, node.kwargs = torch.full, ((), node.args[0]), kwargs
    gm.recompile()


def _dtype_of(number: bool | int | float) -> torch.dtype:
    return torch.bool if isinstance(number, bool) else torch.int64 if isinstance(number, int) else torch.float32


@dataclass(frozen=True)
class Extern:
    """One call of an operation that is not generated code. `inputs`, `outputs`: (shape, dtype) of its tensors."""

    target: str
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class GeneratedGraph:
    """Inductor's wrapper source, kernels included, and the calls that it makes beside them, in order."""

    source: str
    externs: tuple[Extern, ...]


def generate(
    gm: torch.fx.GraphModule, inputs: list[Any], lowering: Any = None, stock: bool = False
) -> GeneratedGraph:
    """What Inductor makes of a graph.

    Args:
        gm, inputs: what `capture` gave; `gm` is not changed.
        lowering: our pass over the post-grad graph; None: Inductor alone.
        stock: Inductor's own Triton scheduling instead of ours: the baseline.
    """
    made: list[GeneratedGraph] = []

    class Module:
        """Stands for the module that would have been loaded."""

        @staticmethod
        def call(*_: Any) -> Any:
            raise _Stopped

    def source_only(self: GraphLowering) -> Any:
        wrapper, _ = self.codegen()
        made.append(GeneratedGraph(getattr(wrapper, "value", wrapper), tuple(_externs(self))))
        return Module

    options = {**forced_options(), "fx_graph_cache": False}
    if lowering is not None:
        options["post_grad_custom_pre_pass"] = lowering
    with mock.patch.object(GraphLowering, "compile_to_module", source_only), _scheduling(stock), torch.no_grad():
        compile_fx(gm, inputs, config_patches=options)
    return made[-1]


def _externs(graph: GraphLowering) -> Iterator[Extern]:
    for operation in graph.operations:
        if isinstance(operation, ir.ExternKernel) and not isinstance(operation, (ir.MultiOutput, ir.ConcatKernel)):
            name = operation.get_kernel_name() or type(operation).__name__
            read = [_tensor(part) for part in operation.inputs]
            written = [_tensor(operation), *(_tensor(part) for part in getattr(operation, "outputs", ()) or ())]
            yield Extern(name.replace("torch.ops.", ""), tuple(filter(None, read)), tuple(filter(None, written)))


def _tensor(node: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of an IR node; None for one that is no tensor."""
    try:
        shape = V.graph.sizevars.optimization_hints(node.get_size())
        return tuple(map(int, shape)), node.get_dtype()
    except (NotImplementedError, AttributeError, AssertionError, TypeError):
        return None


@contextlib.contextmanager
def _scheduling(stock: bool) -> Iterator[None]:
    if not stock:
        yield
        return
    ours = get_scheduling_for_device(device.DEVICE)
    register_backend_for_device(device.DEVICE, TritonScheduling, PythonWrapperCodegen)
    try:
        with config.patch({"triton.autotune_at_compile_time": False}):
            yield
    finally:
        from gcu_compile.codegen.scheduling_private import GcuWrapper

        register_backend_for_device(device.DEVICE, ours, GcuWrapper)
