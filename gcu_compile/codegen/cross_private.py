"""From a model or function on FakeTensors to Inductor's source for the device; nothing is loaded and nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._dynamo.exc import Unsupported
from torch._inductor import config
from torch._inductor.codegen.common import get_scheduling_for_device, register_backend_for_device
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering

from gcu_compile.codegen import device
from gcu_compile.codegen.device_private import forced_options
from gcu_compile.errors import UnsupportedFeatureError


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
    return found[0]


def generate(gm: torch.fx.GraphModule, inputs: list[Any], lowering: Any = None, stock: bool = False) -> str:
    """Inductor's wrapper source, kernels included.

    Args:
        gm, inputs: what `capture` gave; `gm` is not changed.
        lowering: our pass over the post-grad graph; None: Inductor alone.
        stock: Inductor's own Triton scheduling instead of ours: the baseline.
    """
    sources: list[str] = []

    class Module:
        """Stands for the module that would have been loaded."""

        @staticmethod
        def call(*_: Any) -> Any:
            raise _Stopped

    def source_only(self: GraphLowering) -> Any:
        wrapper, _ = self.codegen()
        sources.append(getattr(wrapper, "value", wrapper))
        return Module

    options = {**forced_options(), "fx_graph_cache": False}
    if lowering is not None:
        options["post_grad_custom_pre_pass"] = lowering
    with mock.patch.object(GraphLowering, "compile_to_module", source_only), _scheduling(stock), torch.no_grad():
        compile_fx(gm, inputs, config_patches=options)
    return sources[-1]


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
