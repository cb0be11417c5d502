"""`torch.compile(backend="gcu")`: from a Dynamo graph to a compiled callable.

    options -> target -> AOTAutograd -> our lowering -> Inductor's passes -> code

A graph that needs gradients goes through Inductor without our inference-only rules, and its report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import gcu_compile.kernels.attention
import gcu_compile.kernels.dequant_gemm
import gcu_compile.kernels.linear
import gcu_compile.kernels.prologues
import gcu_compile.kernels.sampling  # noqa: F401  (they define torch.ops.gcu.*)
from gcu_compile import torch_private
from gcu_compile.cache.key import cache_key
from gcu_compile.cache.libraries_private import mend_libraries
from gcu_compile.codegen import direct_private
from gcu_compile.lowering.context import Context, GraphReport
from gcu_compile.lowering.pipeline import check_names, lower
from gcu_compile.options import Options, resolve
from gcu_compile.recording import Recording
from gcu_compile.targets.profile import PROFILES
from gcu_compile.targets.select import TARGETS, check_target, target_of

torch_private.remember_isa_probes()
mend_libraries()
direct_private.install()

# Reports of the graphs compiled in this process, oldest first; a graph found in the cache has the report of the
# compilation that made it.
reports: list[GraphReport] = []
# What was learned of each Dynamo graph in this process, oldest first: cache hit or miss, kernels, seconds.
recordings: list[Recording] = []


def gcu(gm: torch.fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None):
    """The Dynamo backend. `options`: see `gcu_compile.options`; `GCU_COMPILE_*` variables stand behind it.

    Raises:
        UnknownNameError, InvalidValueError: an option that does not exist, or a value it cannot have.
        TargetUnavailableError: the target's device is not here.
    """
    effective = resolve(options)
    target = target_of(effective.target, example_inputs)
    check_target(target, serves="torch.compile", supported=TARGETS)
    check_names(Context(effective, target))
    if effective.shadow != "off":
        from gcu_compile.debug import shadow  # nothing of the shadow check runs when it is off

        shadow.enable(effective)
    recording = Recording(gm, example_inputs, effective, target)
    recordings.append(recording)
    lowering = LoweringPass(effective, target, recording)
    if effective.inductor:
        compiled = torch_private.compile_with_inductor(
            gm,
            example_inputs,
            lowering,
            effective.cache,
            recording.learned,
            recording.bypassed,
            provenance=bool(effective.dump),
            settings=inductor_settings(target, effective),
        )
    else:
        compiled = torch_private.compile_eagerly(gm, example_inputs, lowering)
    recording.finish()
    if recording.state == "hit":
        reports.extend(recording.reports)
    return compiled


def inductor_settings(target: str, options: Options) -> dict[str, Any]:
    """What Inductor must be told for `target`; for a card, its code generation is registered on the way."""
    if target not in PROFILES:
        return {}
    from gcu_compile.codegen import device
    from gcu_compile.codegen.device_private import forced_options

    device.register(target, options.target_profile)
    return forced_options()


class LoweringPass(torch_private.CustomInferenceAwareGraphPass):
    """Our lowering as an Inductor pass. `uuid` makes it an ingredient of Inductor's cache key.

    Args:
        recording: what the compilation is recorded in; None where another keeps the artifacts (vLLM).
    """

    def __init__(self, options: Options, target: str, recording: Recording | None = None):
        self.options, self.target, self.recording = options, target, recording

    def __call__(self, graph: torch.fx.Graph, is_inference: bool = True) -> None:
        report = GraphReport(self.target, is_inference)
        reports.append(report)
        observers = self.recording.lowered(report) if self.recording else []
        if is_inference:
            number = self.recording.number if self.recording else 0
            context = Context(self.options, self.target, report, observers, number)
            lower(graph.owning_module, context)
        if self.options.shadow != "off":
            from gcu_compile.debug import shadow

            shadow.mark(graph)

    def uuid(self) -> str:
        return self.recording.uuid if self.recording else cache_key(self.options, self.target)
