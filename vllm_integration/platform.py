"""The vLLM platform of target `host`: vLLM's CPU platform, compiled by us.

Stock vLLM's CPU platform traces the model once and keeps no compiled artifact between starts. This one
uses vLLM's own compile mode, so that its compile cache works: the second start compiles nothing.
"""

from __future__ import annotations

from vllm.config import CompilationMode
from vllm.platforms.cpu import CpuPlatform

from gcu_compile.options import resolve
from gcu_compile.targets.select import check_target
from vllm_integration import behaviours


class GcuHostPlatform(CpuPlatform):
    """Target `host` in vLLM. The graph is compiled whole: with no device graphs to capture there is nothing to
    gain from splitting it at attention, and 30 layers in one graph share their buffers and one wrapper call."""

    simple_compile_backend = "inductor"

    @classmethod
    def get_compile_backend(cls) -> str:
        return "vllm_integration.compiler.GcuCompiler"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return "vllm_integration.compiler.GcuPassManager"

    @classmethod
    def pre_register_and_update(cls, parser=None) -> None:
        behaviours.refuse_fork()
        target = resolve().target
        check_target("host" if target == "auto" else target, serves="this vLLM build", supported=("host",))
        if parser is not None:
            behaviours.extend_parser(parser)

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        behaviours.refuse_fork()
        behaviours.refuse_multi_step(vllm_config.additional_config or {})
        compilation = vllm_config.compilation_config
        asked_mode, asked_backend = compilation.mode, compilation.backend
        asked_async = vllm_config.scheduler_config.async_scheduling
        super().check_and_update_config(vllm_config)
        if asked_async:
            behaviours.log.warning("async_scheduling is not available on target host; it stays off.")
        ours = asked_backend in ("", "gcu", "inductor", cls.get_compile_backend())
        if asked_mode == CompilationMode.VLLM_COMPILE and compilation.mode != CompilationMode.NONE and ours:
            compilation.mode = CompilationMode.VLLM_COMPILE
            compilation.backend = cls.get_compile_backend()
            if compilation.splitting_ops is None:
                compilation.splitting_ops = []
