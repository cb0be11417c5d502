"""The one module that touches private torch and Inductor APIs (torch 2.11 to 2.13)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass
from torch._inductor.decomposition import select_decomp_table

__all__ = [
    "CustomInferenceAwareGraphPass",
    "compile_eagerly",
    "compile_with_inductor",
    "graph_breaks",
    "triton_version",
]


def triton_version() -> str:
    """Of the installed Triton; "none" without one."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def graph_breaks() -> Counter[str]:
    """Dynamo's graph breaks in this process so far: reason -> occurrences."""
    from torch._dynamo.utils import counters

    return Counter({str(reason).strip().splitlines()[0]: n for reason, n in counters["graph_break"].items()})


def compile_with_inductor(gm: torch.fx.GraphModule, example_inputs: list[Any], lowering: Any, cache: bool):
    """Inductor with `lowering` as the first of its post-grad passes.

    Args:
        lowering: a `CustomInferenceAwareGraphPass`.
        cache: whether Inductor keeps and reuses its artifacts.
    """
    patches: dict[str, Any] = {"post_grad_custom_pre_pass": lowering}
    if not cache:
        patches["fx_graph_cache"] = False
    return compile_fx(gm, example_inputs, config_patches=patches)


def compile_eagerly(gm: torch.fx.GraphModule, example_inputs: list[Any], lowering: Any):
    """Decompose as Inductor would, run `lowering`, and interpret the result: no code is generated."""

    def inference(graph_module: torch.fx.GraphModule, inputs: list[Any]):
        lowering(graph_module.graph, is_inference=True)
        graph_module.recompile()
        return make_boxed_func(graph_module.forward)

    def training(graph_module: torch.fx.GraphModule, inputs: list[Any]):
        lowering(graph_module.graph, is_inference=False)
        return make_boxed_func(graph_module.forward)

    return aot_module_simplified(
        gm,
        example_inputs,
        fw_compiler=training,
        bw_compiler=training,
        inference_compiler=inference,
        decompositions=select_decomp_table(),
    )
