"""The vLLM platform of target `host`: vLLM's CPU platform, compiled by us.

Stock vLLM's CPU platform traces the model once and keeps no compiled artifact between starts. This one
uses vLLM's own compile mode, so that its compile cache works: the second start compiles nothing.
"""

from __future__ import annotations

import os

from vllm.platforms.cpu import CpuPlatform

from gcu_compile.options import resolve
from gcu_compile.targets.select import check_target
from vllm_integration import behaviours

# vLLM's fusions into CUDA kernels, which its CPU build lacks.
DEVICE_FUSIONS = (
    "fuse_norm_quant",
    "fuse_act_quant",
    "fuse_attn_quant",
    "fuse_allreduce_rms",
    "enable_qk_norm_rope_fusion",
    "fuse_rope_kvcache_cat_mla",
    "fuse_act_padding",
    "fuse_mla_dual_rms_norm",
    "fuse_rope_kvcache",
    "fuse_qk_norm_rope_kvcache",
)


class GcuHostPlatform(CpuPlatform):
    """Target `host` in vLLM. The graph is compiled in pieces, split at attention and at the KV write: layers are
    alike, so that Inductor compiles one piece and finds the others in its cache. Against one whole graph that
    halves a cold start and costs no decode speed (docs/architecture.md has the figures)."""

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
        if resolve().dump and not os.environ.get("VLLM_DISABLE_COMPILE_CACHE"):
            os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
            behaviours.log.info("GCU_COMPILE_DUMP is set: vLLM's compile cache is off, for what it holds has no dump.")
        if parser is not None:
            behaviours.extend_parser(parser)

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config) -> None:
        """Until the configuration is complete our compiler goes by the name `inductor`: vLLM's defaults for
        compiled graphs (native operations instead of custom ones) depend on that name."""
        compilation = vllm_config.compilation_config
        if compilation.backend in ("gcu", cls.get_compile_backend()):
            compilation.backend = "inductor"
        for name in DEVICE_FUSIONS:
            if getattr(compilation.pass_config, name) is None:
                setattr(compilation.pass_config, name, False)

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        from vllm.config import CompilationMode  # vllm.config imports the platform: not at the top

        behaviours.refuse_fork()
        behaviours.refuse_multi_step(vllm_config.additional_config or {})
        compilation = vllm_config.compilation_config
        asked_mode, asked_backend = compilation.mode, compilation.backend
        asked_async = vllm_config.scheduler_config.async_scheduling
        torch_wrap = compilation.ir_enable_torch_wrap
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "vllm_integration.worker.GcuHostWorker"
        super().check_and_update_config(vllm_config)
        if asked_async:
            behaviours.log.warning("async_scheduling is not available on target host; it stays off.")
        traced_once = compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE
        if asked_mode == CompilationMode.VLLM_COMPILE and traced_once and asked_backend == "inductor":
            compilation.mode = CompilationMode.VLLM_COMPILE
            compilation.backend = cls.get_compile_backend()
            compilation.ir_enable_torch_wrap = torch_wrap
            parallel = vllm_config.parallel_config
            compilation.set_splitting_ops_for_v1(parallel.all2all_backend, parallel.data_parallel_size)
            # vLLM fills this in only where it captures device graphs, yet looks every shape up in it.
            compilation.compile_sizes = compilation.compile_sizes or []
