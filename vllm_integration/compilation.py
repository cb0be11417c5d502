"""What both platforms do to vLLM's compilation settings: its compile mode, our compiler, no CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gcu_compile.cache.key import cache_key
from gcu_compile.lowering.rules import rope_and_cache
from gcu_compile.options import resolve
from vllm_integration import versions

# vLLM's operation that writes keys and values, where attention does not.
CACHE_UPDATE = "vllm::unified_kv_cache_update"
# vLLM's fusions into CUDA kernels.
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


def apply_defaults(compilation: Any, compiler: str) -> None:
    """Before vLLM completes its configuration.

    Until then our compiler goes by the name `inductor`: vLLM's defaults for compiled graphs (native operations
    instead of custom ones) depend on that name.
    """
    if compilation.backend in ("gcu", compiler):
        compilation.backend = "inductor"
    for name in DEVICE_FUSIONS:
        if getattr(compilation.pass_config, name, False) is None:
            setattr(compilation.pass_config, name, False)


def take_over(vllm_config: Any, compiler: str, target: str) -> None:
    """Compile for `target` with `compiler` in the mode that keeps artifacts between starts, in pieces split at
    attention."""
    from vllm.config import CompilationMode  # vllm.config imports the platform: not at the top

    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.backend = compiler
    theirs = compilation.splitting_ops is None
    compilation.set_splitting_ops_for_v1(parallel.all2all_backend, parallel.data_parallel_size)
    if _joins_writes() and theirs:
        compilation.splitting_ops.remove(CACHE_UPDATE)  # a call in a piece, for the rule to join with what precedes it
    # vLLM fills this in only where it captures device graphs, yet looks every shape up in it.
    compilation.compile_sizes = compilation.compile_sizes or []
    vllm_config.additional_config = keyed(vllm_config.additional_config, cache_key(resolve(), target))


@dataclass(frozen=True)
class Keyed:
    """vLLM's `additional_config` where it is no dict, and the key of our code."""

    given: Any
    key: str

    def compute_hash(self) -> str:
        return f"{self.given.compute_hash()}-{self.key}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy of this is no copy of what was given
            raise AttributeError(name)
        return getattr(object.__getattribute__(self, "given"), name)


def keyed(additional: Any, key: str) -> Any:
    """`additional`, a configuration's `additional_config`, with `key` in its hash.

    vLLM asks no compiler for its hash when it looks for whole models that were compiled ahead of time, only its own
    configuration: without this a start would take up code of other rules, options or versions of ours.
    """
    if isinstance(additional, dict):
        return {**additional, "gcu_compile": key}
    return Keyed(additional.given if isinstance(additional, Keyed) else additional, key)


def writes_apart(attn_type: str) -> bool:
    """Whether a layer that is made now leaves the write of its keys and values to an operation of its own: where its
    graph is compiled with rule `rope_and_cache`, and the operation stands in a compiled piece."""
    from vllm.config import CompilationMode, get_current_vllm_config  # vllm.config imports the platform: not at the top

    config = get_current_vllm_config().compilation_config
    compiled = config.mode == CompilationMode.VLLM_COMPILE and CACHE_UPDATE not in (config.splitting_ops or ())
    return compiled and _joins_writes() and attn_type == "decoder"


def _joins_writes() -> bool:
    """Whether rule `rope_and_cache` is on, and layers can share the code that it makes."""
    (rule,) = rope_and_cache.RULES
    return rule.is_on(resolve()) and versions.layers_are_inputs()


def rotate_in_plain_torch(compilation: Any) -> None:
    """For latent attention on the CPU: vLLM's rotary kernel there takes [tokens, heads, size] for [batch, tokens, size]
    and is wrong for more than one token. Compiled graphs do not call it; eager ones would."""
    if not any(name.lstrip("+-") == "rotary_embedding" for name in compilation.custom_ops):
        compilation.custom_ops.append("-rotary_embedding")
