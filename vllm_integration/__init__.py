"""vLLM with gcu-compile: the platform, its compiler, and the seven behaviours. Imports vLLM only when called."""

import importlib.util

HOST_PLATFORM = "vllm_integration.platform.GcuHostPlatform"
GCU_PLATFORM = "vllm_integration.gcu_platform.GcuPlatform"
# Name and class of our attention backends.
ATTENTION = ("GCU_ATTN", "vllm_integration.attention.GcuAttentionBackend")
ATTENTION_WRITTEN = "vllm_integration.attention.GcuWrittenBackend"
MLA = ("GCU_MLA", "vllm_integration.mla.GcuMLABackend")


def platform_plugin() -> str:
    """Entry point `vllm.platform_plugins`: the platform class that vLLM shall use, by its dotted name.

    vLLM swallows what this raises, so the target is checked later, where an error reaches the user. General
    plugins run inside the first `EngineArgs(...)`, too late to change its defaults, and so this entry point,
    which comes first, asks to be called again once that class exists.
    """
    from vllm_integration import behaviours, vllm_private

    # vLLM asks for the platform while it imports this module.
    vllm_private.when_imported("vllm.engine.arg_utils", behaviours.install_engine_args)
    return GCU_PLATFORM if wants_card() else HOST_PLATFORM


def wants_card() -> bool:
    """Whether models run on a GCU: an emulated one is asked for, or torch_gcu is here and target is not the host."""
    from gcu_compile.errors import GcuCompileError
    from gcu_compile.options import resolve

    try:
        options = resolve()
    except GcuCompileError:  # reported later, where the message reaches the user
        return False
    if options.emulate:
        return True
    return options.target in ("auto", "gcu300", "gcu400") and importlib.util.find_spec("torch_gcu") is not None


def register() -> None:
    """Entry point `vllm.general_plugins`: runs in every vLLM process, possibly more than once."""
    from vllm_integration import behaviours, models, quantization, versions, vllm_private

    for backend in (MLA, ATTENTION):  # so that --attention-backend knows them
        versions.register_attention(*backend)
    behaviours.install()
    vllm_private.when_imported("vllm.v1.engine.core_client", vllm_private.end_output_threads_at_exit)
    quantization.install()
    models.register()
