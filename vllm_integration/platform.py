"""The vLLM platform of target `host`: vLLM's CPU platform, compiled by us.

Stock vLLM's CPU platform traces the model once and keeps no compiled artifact between starts. This one
uses vLLM's own compile mode, so that its compile cache works: the second start compiles nothing.
"""

from __future__ import annotations

import functools
import os

import torch
from vllm.platforms.cpu import CpuPlatform

from gcu_compile.options import resolve
from gcu_compile.targets.select import check_target
from vllm_integration import ATTENTION, ATTENTION_WRITTEN, MLA, behaviours, compilation, cores, versions
from vllm_integration.quantization import cache

# What vLLM's CPU platform changes for models of latent attention, whose own kernel needs it; ours does not.
MLA_KEEPS = (
    ("cache_config", "block_size"),
    ("cache_config", "enable_prefix_caching"),
    ("scheduler_config", "enable_chunked_prefill"),
    ("scheduler_config", "max_num_batched_tokens"),
)


@functools.cache
def report_attention(backend: str, why: str) -> None:
    """Log a choice of backend, once per process."""
    behaviours.log.info("Attention: %s (%s).", backend, why)


class GcuHostPlatform(CpuPlatform):
    """Target `host` in vLLM. The graph is compiled in pieces, split at attention, which writes the cache too: layers
    are alike, so that Inductor compiles one piece and finds the others in its cache. Against one whole graph that
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
        """Our backend; vLLM's own where the user names it or option `attention` says so, and for fp8 caches and sparse
        attention, which ours do not read. The choice is logged once, with its reason."""
        asked = attn_selector_config
        ours = MLA if asked.use_mla else ATTENTION
        name = versions.register_attention(*ours)
        if asked.use_sparse or (asked.kv_cache_dtype or "").startswith("fp8"):
            takes_ours, why = False, f"{ours[0]} reads no sparse attention and no fp8 cache"
        elif selected_backend is not None:
            takes_ours, why = selected_backend.name == name, f"attention backend {selected_backend.name} is asked for"
        elif (asked.kv_cache_dtype or "").startswith("int8"):
            takes_ours, why = True, "only it reads an int8 cache"
        else:
            takes_ours, why = cls.prefers_ours(asked.use_mla, asked.dtype), f"option attention is {resolve().attention}"
        if ours is ATTENTION and takes_ours and compilation.writes_apart(asked.attn_type):
            ours = (ATTENTION[0], ATTENTION_WRITTEN)
        path = ours[1] if takes_ours else super().get_attn_backend_cls(selected_backend, asked, num_heads)
        report_attention(path.rpartition(".")[2], why)
        return path

    @classmethod
    def prefers_ours(cls, mla: bool, dtype: torch.dtype) -> bool:
        """Whether a cache that both backends read is served by ours: what option `attention` says. For latent
        attention vLLM has a kernel that is more than a reference only with AMX, and that takes bfloat16 alone."""
        said = resolve().attention
        if said != "auto":
            return said == "gcu"
        return not (mla and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())

    @classmethod
    def mla_is_ours(cls, vllm_config) -> bool:
        """Whether this model has latent attention that our backend serves."""
        model, asked = vllm_config.model_config, vllm_config.attention_config.backend
        if model is None or not model.use_mla or model.hf_config.model_type == "deepseek_v4":
            return False
        return cls.prefers_ours(True, model.dtype) if asked is None else asked.name == versions.register_attention(*MLA)

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
        behaviours.refuse_multi_step(vllm_config.additional_config)
        config = vllm_config.compilation_config
        asked_mode, asked_backend = config.mode, config.backend
        asked_async = vllm_config.scheduler_config.async_scheduling
        executor = vllm_config.parallel_config.distributed_executor_backend
        torch_wrap, model = config.ir_enable_torch_wrap, vllm_config.model_config
        if model is not None and model.use_mla:
            versions.need_latent_attention()
        cache.choose(vllm_config)
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "vllm_integration.worker.GcuHostWorker"
        mla = vllm_config if cls.mla_is_ours(vllm_config) else None
        kept = mla and {(part, name): getattr(getattr(mla, part), name) for part, name in MLA_KEEPS}
        super().check_and_update_config(vllm_config)
        for (part, name), value in (kept or {}).items():
            setattr(getattr(vllm_config, part), name, value)
        if mla and not mla.cache_config.user_specified_block_size:
            mla.cache_config.block_size = 128  # vLLM's default for every other model on this platform
        if model is not None and (model.use_mla or model.is_deepseek_mla):  # the latter with VLLM_MLA_DISABLE=1, too
            compilation.rotate_in_plain_torch(config)
        cores.keep_in_process(executor, vllm_config.parallel_config)
        if asked_async:
            behaviours.log.warning("async_scheduling is not available on target host; it stays off.")
        traced_once = config.mode == CompilationMode.DYNAMO_TRACE_ONCE
        if asked_mode == CompilationMode.VLLM_COMPILE and traced_once and asked_backend == "inductor":
            compilation.take_over(vllm_config, cls.get_compile_backend(), "host")
            config.ir_enable_torch_wrap = torch_wrap
