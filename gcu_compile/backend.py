"""`torch.compile(backend="gcu")`: from a Dynamo graph to a compiled callable.

    options -> target -> AOTAutograd -> Inductor's post-grad passes with our lowering in them -> code

A graph that needs gradients goes through Inductor without our inference-only rules, and its report says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

import gcu_compile.kernels.attention
import gcu_compile.kernels.dequant_gemm
import gcu_compile.kernels.sampling  # noqa: F401  (they define torch.ops.gcu.*)
from gcu_compile import torch_private
from gcu_compile.lowering import source_hash
from gcu_compile.lowering.context import Context, GraphReport
from gcu_compile.lowering.pipeline import check_names, lower
from gcu_compile.options import Options, resolve
from gcu_compile.targets.select import check_target, target_of

# Reports of the graphs lowered in this process, oldest first.
reports: list[GraphReport] = []


def gcu(gm: torch.fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None):
    """The Dynamo backend. `options`: see `gcu_compile.options`; `GCU_COMPILE_*` variables stand behind it.

    Raises:
        UnknownNameError, InvalidValueError: an option that does not exist, or a value it cannot have.
        TargetUnavailableError: the target's device is not here.
    """
    effective = resolve(options)
    target = target_of(effective.target, example_inputs)
    check_target(target, serves="torch.compile", supported=("host", "cuda"))
    lowering = LoweringPass(effective, target)
    check_names(Context(effective, target))
    if not effective.inductor:
        return torch_private.compile_eagerly(gm, example_inputs, lowering)
    return torch_private.compile_with_inductor(gm, example_inputs, lowering, cache=effective.cache)


class LoweringPass(torch_private.CustomInferenceAwareGraphPass):
    """Our lowering as an Inductor pass. `uuid` makes it an ingredient of Inductor's cache key."""

    def __init__(self, options: Options, target: str):
        self.options, self.target = options, target

    def __call__(self, graph: torch.fx.Graph, is_inference: bool = True) -> None:
        context = Context(self.options, self.target, GraphReport(self.target, is_inference))
        reports.append(context.report)
        if is_inference:
            lower(graph.owning_module, context)

    def uuid(self) -> str:
        return cache_key(self.options, self.target)


def cache_key_ingredients(options: Options, target: str) -> dict[str, Any]:
    """What generated code depends on, by name, beside the graph and what Inductor itself hashes."""
    return {
        "torch": torch.__version__,
        "triton": torch_private.triton_version(),
        "target": target,
        "options": options.code_key(),
        "sources": source_hash(),
    }


def cache_key(options: Options, target: str) -> str:
    """Hash of `cache_key_ingredients`."""
    text = json.dumps(cache_key_ingredients(options, target), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
