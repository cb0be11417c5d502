"""Baichuan 1 and 2, 7B (rotary embeddings) and 13B (ALiBi): Llama with q, k and v in one tensor on disk, `W_pack`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from gcu_compile.errors import UnsupportedFeatureError


def alibi_slopes(heads: int) -> list[float]:
    """A geometric sequence for a power of two of heads; for the rest, every second one of twice as many."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]


class AlibiAttention(nn.Module):
    """Attention whose scores fall with the distance, in the place of Llama's, which has no such argument."""

    def __init__(self, config, hidden_size, num_heads, quant_config=None, cache_config=None, prefix="", **of_llama):
        super().__init__()
        size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if num_heads % size:
            raise UnsupportedFeatureError(f"{num_heads} heads cannot be split over {size} tensor-parallel workers")
        local, width = num_heads // size, hidden_size // num_heads
        self.qkv_proj = QKVParallelLinear(
            hidden_size, width, num_heads, bias=False, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            hidden_size, hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.attn = Attention(
            local,
            width,
            width**-0.5,
            alibi_slopes=alibi_slopes(num_heads)[rank * local : (rank + 1) * local],
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Positions are in the slopes."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.chunk(3, dim=-1)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out


class BaichuanForCausalLM(LlamaForCausalLM):
    """Both sizes, told by their configurations."""

    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr={".W_pack": ".qkv_proj"})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type = LlamaDecoderLayer):
        if vllm_config.model_config.hf_config.max_position_embeddings is None:
            layer_type = functools.partial(layer_type, attn_layer_type=AlibiAttention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        weights = self.hf_to_vllm_mapper.apply(weights)
        return super().load_weights(self._with_unit_rows(weights) if self.config.norm_head else weights)

    def _with_unit_rows(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Baichuan2's head divides its rows by their lengths in every step; here once."""
        for name, tensor in weights:
            if name.startswith("lm_head."):
                if name != "lm_head.weight":
                    raise UnsupportedFeatureError(f"{name}: a quantised head, whose rows cannot have length 1")
                tensor = nn.functional.normalize(tensor.float()).to(tensor.dtype)
            yield name, tensor
