"""vLLM's attention backend for multi-head latent attention (DeepSeek-V2 and its kind) on `gcu::mla_attention`.

vLLM's layer divides a batch into decodes, whose queries it absorbs by itself, and prefills, which it hands over as they
are. Here everything is handed over: the operation takes whole batches, and chooses for each sequence. So chunked
prefill, prefix caching and the verification of several tokens, which vLLM's CPU backend lacks, need nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend, MLACommonImpl, split_kv_b_proj
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, AttentionType

import gcu_compile.kernels.attention  # noqa: F401  (defines torch.ops.gcu.*)
from gcu_compile.errors import UnsupportedFeatureError
from vllm_integration.attention import BLOCK_SIZES, DTYPES, FLOAT_CACHES

NAME = "GCU_MLA"


class GcuMLABackend(MLACommonBackend):
    """Registered by the platform under `GCU_MLA`; `--attention-backend CPU_MLA` restores vLLM's own."""

    supported_dtypes: ClassVar[list[torch.dtype]] = DTYPES
    supported_kv_cache_dtypes: ClassVar[list[str]] = FLOAT_CACHES

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[GcuMLAImpl]:
        return GcuMLAImpl

    @staticmethod
    def get_builder_cls() -> type[GcuMLAMetadataBuilder]:
        return GcuMLAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        return BLOCK_SIZES

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any


@dataclass
class MLAMetadata(AttentionMetadata):
    """Tables of one step, as `gcu::mla_attention` takes them, and the numbers by which vLLM's layer divides a batch:
    every token is a prefill's."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    causal: bool
    num_prefills: int
    num_decodes: int = 0
    num_decode_tokens: int = 0


class GcuMLAMetadataBuilder(AttentionMetadataBuilder[MLAMetadata]):
    """Hands vLLM's tables on: the kernel plans its work by itself."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> MLAMetadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise UnsupportedFeatureError(f"{NAME} takes one `causal` for a whole batch.")
        return MLAMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            causal=bool(common.causal),
            num_prefills=common.num_reqs,
        )


class GcuMLAImpl(MLACommonImpl[MLAMetadata]):
    """One layer."""

    can_return_lse_for_decode: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla: Any,
    ) -> None:
        asked = {"ALiBi": alibi_slopes, "a sliding window": sliding_window, "a soft cap": logits_soft_cap}
        asked["an indexer (sparse attention)"] = mla.get("indexer")
        asked[f"attention of type {attn_type}"] = attn_type != AttentionType.DECODER
        for what, given in asked.items():
            if given:
                raise UnsupportedFeatureError(f"{NAME} does not know multi-head latent attention with {what}.")
        super().__init__(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
                         logits_soft_cap, attn_type, kv_sharing_target_layer_name, **mla)  # fmt: skip
        self.supports_quant_query_input = False
        self.w_uk: torch.Tensor | None = None
        self.w_uv: torch.Tensor | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Parts of `kv_b_proj`, dequantised: w_uk [heads, nope, rank] and w_uv [heads, rank, v_dim]."""
        sizes = self.kv_lora_rank, self.num_heads, self.qk_nope_head_dim, self.v_head_dim
        w_uk, w_uv = split_kv_b_proj(self.kv_b_proj, act_dtype, *sizes)
        self.w_uk, self.w_uv = w_uk.permute(1, 2, 0).contiguous(), w_uv.transpose(0, 1).contiguous()

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale) -> None:
        """Write a step's latents [tokens, rank] and shared keys [tokens, 1, rope]; slot -1 is not written."""
        if not kv_cache.numel():
            return
        tokens, rank = slot_mapping.numel(), kv_c_normed.shape[-1]
        cache = kv_cache.unsqueeze(1)
        latent, shared = kv_c_normed[:tokens].unsqueeze(1), k_pe[:tokens].view(tokens, 1, -1)
        torch.ops.gcu.write_kv(latent, shared, slot_mapping.flatten(), cache[..., :rank], cache[..., rank:])

    def forward_mha(self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output,
                    output_scale=None) -> None:  # fmt: skip
        """Attention of one step: `q` [tokens, heads, nope + rope] -> `output` [tokens, heads * v_dim]."""
        m = attn_metadata
        found = torch.ops.gcu.mla_attention(
            q,
            kv_c_and_k_pe_cache,
            self.w_uk,
            self.w_uv,
            m.block_table,
            m.query_start_loc,
            m.seq_lens,
            scale=self.scale,
            causal=m.causal,
        )
        output.copy_(found.flatten(1).view_as(output))

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        raise NotImplementedError(f"{NAME} has no decode of its own: `MLAMetadata.num_decode_tokens` is 0")
