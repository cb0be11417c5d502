"""Configurations of our models, as their repositories' config.json spell them.

Each has what vLLM's Llama reads, under Llama's names, and rotary embeddings as `rope_parameters`. What is computed here
is computed once more when a configuration is read back, and must not change then.
"""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from gcu_compile.errors import UnsupportedFeatureError

# Of Baichuan2, and of no Baichuan 1: its head's rows have length 1.
BAICHUAN2_VOCABULARY = 125696


@strict
class AquilaConfig(LlamaConfig):
    """Llama's."""

    model_type = "aquila"
    vocab_size: int = 100008


@strict
class InternLMConfig(LlamaConfig):
    """Llama with `bias` for the projections of attention, and rotary embeddings as `rotary`: base and type."""

    model_type = "internlm"
    vocab_size: int = 103168
    bias: bool = True
    rotary: dict | None = None

    def __post_init__(self, **kwargs):
        if self.rotary:
            kwargs.setdefault("rope_theta", float(self.rotary.get("base", self.default_theta)))
        super().__post_init__(**kwargs)


@strict
class BaichuanConfig(LlamaConfig):
    """Llama without grouped heads. The models of 13B have no `max_position_embeddings`, but ALiBi.

    `norm_head` is ours: whether the head's rows are brought to length 1 as they are loaded.
    """

    model_type = "baichuan"
    vocab_size: int = 64000
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    norm_head: bool | None = None

    def __post_init__(self, **kwargs):
        if self.norm_head is None:
            self.norm_head = self.vocab_size == BAICHUAN2_VOCABULARY
        super().__post_init__(**kwargs)


@strict
class QWenConfig(PreTrainedConfig):
    """The first Qwen. `intermediate_size` is twice that of the layers."""

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    layer_norm_epsilon: float = 1e-6
    max_position_embeddings: int = 8192
    seq_length: int | None = None
    rotary_pct: float = 1.0
    rotary_emb_base: int | float = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    rope_parameters: dict | None = None
    # Llama's names for what all of these models have.
    hidden_act: str = "silu"
    qkv_bias: bool = True

    def __post_init__(self, **kwargs):
        if not self.no_bias:
            raise UnsupportedFeatureError("a Qwen with `no_bias: false` is not implemented")
        if "visual" in kwargs:
            raise UnsupportedFeatureError("Qwen-VL is not implemented: config.json has `visual`; text models only")
        self.seq_length = self.seq_length or self.max_position_embeddings
        self.head_dim, self.rms_norm_eps = self.kv_channels, self.layer_norm_epsilon
        kwargs.setdefault("rope_theta", float(self.rotary_emb_base))
        kwargs.setdefault("partial_rotary_factor", self.rotary_pct)
        super().__post_init__(**kwargs)
