"""How vLLM's compile mode reaches our compiler.

    VllmBackend -> GcuCompiler.compile -> Inductor -> post-grad: GcuPassManager = vLLM's passes, then our lowering

vLLM compiles in pieces and skips a piece that equals an earlier one. Each piece is recorded as a Dynamo graph of
`torch.compile` is: the report of a skipped piece is that of the piece which it equals, with its own layer's name.
"""

from __future__ import annotations

import torch
from vllm.compilation.backends import StopCompiling
from vllm.compilation.compiler_interface import InductorStandaloneAdaptor
from vllm.compilation.passes.pass_manager import PostGradPassManager

from gcu_compile import backend, torch_private
from gcu_compile.backend import LoweringPass
from gcu_compile.cache.key import cache_key
from gcu_compile.options import resolve
from gcu_compile.recording import Recording
from gcu_compile.targets.select import gcu_target
from vllm_integration import cache_write

cache_write.install()  # also where compiled code is found again, which calls the operation


def target() -> str:
    """What this vLLM process compiles for: `host`, or the card that its platform stands for."""
    from vllm.platforms import current_platform

    return gcu_target() if current_platform.device_type == "gcu" else "host"


class GcuCompiler(InductorStandaloneAdaptor):
    """vLLM's `CompilerInterface` on Inductor's standalone artifacts, which vLLM saves and loads."""

    name = "gcu"

    def __init__(self) -> None:
        super().__init__("binary")

    def compute_hash(self, vllm_config) -> str:
        """vLLM's own factors and ours: a changed rule or option is a cache miss."""
        return f"{super().compute_hash(vllm_config)}-{cache_key(resolve(), target())[:16]}"

    def compile(self, graph, example_inputs, compiler_config, compile_range, key=None):
        """vLLM's own compilation of one piece, recorded."""
        options = resolve()
        recording = Recording(graph, example_inputs, options, target())
        for value in compiler_config.values():
            if isinstance(value, GcuPassManager):
                value.lowering.recording = recording
        if options.dump:
            compiler_config = {**compiler_config, "trace.provenance_tracking_level": 1}
        try:
            with torch_private.learning(recording.learned), torch_private.telling_bypasses(recording.bypassed):
                compiled = super().compile(graph, example_inputs, compiler_config, compile_range, key)
        except StopCompiling:  # vLLM has an equal piece already
            self._finish(recording)
            raise
        self._finish(recording)
        return compiled

    @staticmethod
    def _finish(recording: Recording) -> None:
        recording.finish()
        backend.recordings.append(recording)
        if recording.state == "hit":
            backend.reports.extend(recording.reports)


class LeftToInductor:
    """A pass that does nothing."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        return None

    def uuid(self) -> str:
        return "left to Inductor"


class GcuPassManager(PostGradPassManager):
    """vLLM's passes, which lower its IR operations, then our lowering: rules meet norms and activations as ATen.

    vLLM's own de-functionalisation is left out: it names CUDA operations that the CPU build lacks. Inductor's
    `decompose_auto_functionalized`, which runs after the custom passes, does the same for every operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowering = LoweringPass(resolve(), target=target())

    def configure(self, config) -> None:
        super().configure(config)
        self.fix_functionalization = LeftToInductor()

    def __call__(self, graph: torch.fx.Graph) -> None:
        super().__call__(graph)
        self.lowering(graph)

    def uuid(self) -> str:
        return f"{super().uuid()}-{self.lowering.uuid()}"
