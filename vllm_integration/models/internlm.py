"""The first InternLM: Llama with biases in attention's projections."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from vllm_integration.models.limits import refuse_beyond


class InternLMForCausalLM(LlamaForCausalLM):
    """Llama's layers read `bias` of the configuration."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type = LlamaDecoderLayer):
        rotary = vllm_config.model_config.hf_config.rotary or {}
        if rotary.get("type") == "dynamic":  # bases that grow with the length, beyond what the model was trained for
            refuse_beyond(vllm_config, "max_position_embeddings", ["rotary (dynamic)"])
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
