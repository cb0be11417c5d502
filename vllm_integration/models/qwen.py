"""The first Qwen (Qwen-7B, 14B, 72B): Llama's layers with biases of q, k and v, which lie in one tensor on disk."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from vllm_integration.models.limits import refuse_beyond


class QWenDecoderLayer(LlamaDecoderLayer):
    """Llama's, of half the configuration's `intermediate_size`, which counts gate and up together."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config=None):
        config = copy.copy(config or vllm_config.model_config.hf_config)
        config.intermediate_size //= 2
        super().__init__(vllm_config, prefix, config)


class QWenLMHeadModel(LlamaForCausalLM):
    """Names of the checkpoint become Llama's; a tensor of q, k and v stays one, and vLLM's loader cuts it."""

    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "transformer.wte.": "model.embed_tokens.",
            "transformer.h.": "model.layers.",
            "transformer.ln_f.": "model.norm.",
        },
        orig_to_new_substr={
            ".ln_1": ".input_layernorm",
            ".attn.c_attn": ".self_attn.qkv_proj",
            ".attn.c_proj": ".self_attn.o_proj",
            ".ln_2": ".post_attention_layernorm",
            ".mlp.w2": ".mlp.gate_proj",
            ".mlp.w1": ".mlp.up_proj",
            ".mlp.c_proj": ".mlp.down_proj",
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type = QWenDecoderLayer):
        config = vllm_config.model_config.hf_config
        flags = [flag for flag in ("use_dynamic_ntk", "use_logn_attn") if getattr(config, flag)]
        refuse_beyond(vllm_config, "seq_length", flags)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(self.hf_to_vllm_mapper.apply(weights))
