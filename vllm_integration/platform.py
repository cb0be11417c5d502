"""The vLLM platform of target `host`: vLLM's CPU platform, compiled by us.

Stock vLLM's CPU platform traces the model once and keeps no compiled artifact between starts. This one
uses vLLM's own compile mode, so that its compile cache works: the second start compiles nothing.
"""

from __future__ import annotations

import os

from vllm.platforms.cpu import CpuPlatform

from gcu_compile.options import resolve
from gcu_compile.targets.select import check_target
from vllm_integration import ATTENTION, behaviours, compilation, versions

# Query heads x head size from which our attention is the default. A call of ours costs some 0.1 ms more than one of
# vLLM's: a fifth of SmolLM2-135M's decode speed (9 x 64), and little beside a layer of Llama-1B's width (32 x 64).
WIDE = 2048


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
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:
        """Our backend; vLLM's own where the user names it, for narrow models (option `attention`), for MLA, and for
        fp8 caches, which ours does not read."""
        ours = versions.register_attention(*ATTENTION)
        asked = attn_selector_config
        stock = selected_backend is not None and selected_backend.name != ours
        if selected_backend is None and not (asked.kv_cache_dtype or "").startswith("int8"):
            stock = not cls.prefers_ours()
        if stock or asked.use_mla or asked.use_sparse or (asked.kv_cache_dtype or "").startswith("fp8"):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        return ATTENTION[1]

    @classmethod
    def prefers_ours(cls) -> bool:
        """Whether a cache that both backends read is served by ours: what option `attention` says."""
        from vllm.config import get_current_vllm_config

        said = resolve().attention
        if said != "auto":
            return said == "gcu"
        config = get_current_vllm_config()
        heads = config.model_config.get_num_attention_heads(config.parallel_config)
        return heads * config.model_config.get_head_size() >= WIDE

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
        compilation.apply_defaults(vllm_config.compilation_config, cls.get_compile_backend())

    @classmethod
    def check_and_update_config(cls, vllm_config) -> None:
        from vllm.config import CompilationMode  # vllm.config imports the platform: not at the top

        behaviours.refuse_fork()
        behaviours.refuse_multi_step(vllm_config.additional_config or {})
        config = vllm_config.compilation_config
        asked_mode, asked_backend = config.mode, config.backend
        asked_async = vllm_config.scheduler_config.async_scheduling
        torch_wrap = config.ir_enable_torch_wrap
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "vllm_integration.worker.GcuHostWorker"
        super().check_and_update_config(vllm_config)
        if asked_async:
            behaviours.log.warning("async_scheduling is not available on target host; it stays off.")
        traced_once = config.mode == CompilationMode.DYNAMO_TRACE_ONCE
        if asked_mode == CompilationMode.VLLM_COMPILE and traced_once and asked_backend == "inductor":
            compilation.take_over(vllm_config, cls.get_compile_backend())
            config.ir_enable_torch_wrap = torch_wrap
