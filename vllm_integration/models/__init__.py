"""Language models that vLLM removed, as models of ours: Qwen v1, Baichuan 1 and 2, InternLM v1, Aquila; and DBRX, whose
checkpoints vLLM 0.32 does not load.

How to add one: README.md beside this file. Importing this package imports neither vLLM nor transformers.
"""

from __future__ import annotations

# Architecture of a config.json -> (module and class here, configuration in `configs.py`).
MODELS = {
    "QWenLMHeadModel": ("qwen:QWenLMHeadModel", "QWenConfig"),
    "BaiChuanForCausalLM": ("baichuan:BaichuanForCausalLM", "BaichuanConfig"),
    "BaichuanForCausalLM": ("baichuan:BaichuanForCausalLM", "BaichuanConfig"),
    "InternLMForCausalLM": ("internlm:InternLMForCausalLM", "InternLMConfig"),
    "AquilaModel": ("aquila:AquilaForCausalLM", "AquilaConfig"),
    "AquilaForCausalLM": ("aquila:AquilaForCausalLM", "AquilaConfig"),
}
# In the place of vLLM's own.
REPAIRED = {"DbrxForCausalLM": "dbrx:DbrxForCausalLM"}


def register() -> None:
    """Make our models known to vLLM, and their configurations to transformers. Idempotent.

    A class of the running vLLM is left alone but for `REPAIRED`, and so is a configuration that somebody registered
    before. A configuration that is registered is taken before a repository's own code, which then need not be trusted.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from vllm.model_executor.models import ModelRegistry

    from vllm_integration.models import configs

    known = set(ModelRegistry.get_supported_archs())
    for architecture, (place, config) in MODELS.items():
        if architecture in known:
            continue
        # As text: the class is imported where a model is loaded, not wherever plugins are.
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
        config = getattr(configs, config)
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
    for architecture, place in REPAIRED.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
