"""vLLM's attention backend on `gcu::paged_attention`, `gcu::write_kv` and `gcu::attention`.

    common metadata -> Metadata (tables as they are, converted once a step)
    forward: keys and values of the step -> cache, quantised where the cache is int8; then the whole batch (decode,
        verify, chunked and whole prefill) in one call; encoder-only layers, which keep no cache, sequence by sequence

The write is part of `forward`, unless the graph is compiled with rule `rope_and_cache`: that joins it to the rotation
(`cache_write.py`), and `GcuWrittenBackend` serves.

A page of one KV head is [K of all slots | V of all slots], then, for an int8 cache, the float32 scales of both, one per
slot: what one head reads lies together. Copies and swaps of whole pages, which is what vLLM does, keep it so.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.kv_cache_interface import CrossAttentionSpec

from gcu_compile.errors import UnsupportedFeatureError
from gcu_compile.kernels.attention.layer import Layer, Step
from vllm_integration import ATTENTION, versions

NAME = versions.register_attention(*ATTENTION)
INT8 = "int8_per_token_head"
# What both of our backends take.
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FLOAT_CACHES = ["auto", "float16", "bfloat16"]
BLOCK_SIZES = [16, 32, 64, 128, 256]
ENCODER = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
SCALE_BYTES = 8  # of one slot of one head: two float32


class GcuAttentionBackend(versions.cache_interface(SCALE_BYTES), AttentionBackend):
    """Registered under `GCU_ATTN` (vLLM 0.26: `CUSTOM`); `--attention-backend CPU_ATTN` restores vLLM's own."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = DTYPES
    supported_kv_cache_dtypes: ClassVar[list[str]] = [*FLOAT_CACHES, INT8]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[GcuAttentionImpl]:
        return GcuAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[GcuMetadataBuilder]:
        return GcuMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        return BLOCK_SIZES

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, *ENCODER, AttentionType.ENCODER_DECODER)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


@dataclass
class Metadata(AttentionMetadata):
    """Tables of one step, as `gcu::paged_attention` takes them; tokens past the last sequence are padding.

    vLLM's wrapper for cross attention sets `slot_mapping` after the builder is done.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool

    _step: Step | None = None

    @property
    def step(self) -> Step:
        """Them, converted: made when the first layer asks, shared by all, and again if one was replaced."""
        now = self.block_table, self.query_start_loc, self.seq_lens, self.slot_mapping, self.causal
        if self._step is None or not all(map(operator.is_, now, self._step.given)):
            self._step = Step(*now)
        return self._step


class GcuMetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Hands vLLM's tables on: the kernel plans its work by itself."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.cross = isinstance(kv_cache_spec, CrossAttentionSpec)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Metadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise UnsupportedFeatureError(
                "GCU_ATTN takes one `causal` for a whole batch. Choose vLLM's own kernel for models that mix both: "
                "attention_config={'backend': 'CPU_ATTN'}."
            )
        return Metadata(
            query_start_loc=common.query_start_loc[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs],
            block_table=common.block_table_tensor[: common.num_reqs],
            slot_mapping=common.slot_mapping,
            causal=bool(common.causal) and not self.cross,
        )


def pages(kv_cache: torch.Tensor, k_size: int, v_size: int) -> dict[str, torch.Tensor | None]:
    """Views of a layer's cache: `k_cache`, `v_cache`, and the scales of an int8 one.

    Args:
        kv_cache: [num_blocks, kv_heads, block_size, k_size + v_size (+ bytes of scales)], a page contiguous.
    """
    blocks, heads, slots, _ = kv_cache.shape
    page = kv_cache.flatten(2)

    def part(begin: int, size: int) -> torch.Tensor:
        return page[..., begin : begin + slots * size].unflatten(2, (slots, size))

    found = {"k_cache": part(0, k_size), "v_cache": part(slots * k_size, v_size)}
    if kv_cache.dtype != torch.int8:
        return found
    for i, name in enumerate(("k_scale_cache", "v_scale_cache")):
        begin = slots * (k_size + v_size + 4 * i)
        found[name] = page[..., begin : begin + 4 * slots].view(torch.float32)
    return found


def encode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Bidirectional attention without a cache, as encoders of images and sound use it.

    Args:
        q: [batch, length, heads, head_size]. k, v: [batch, length, kv_heads, head_size].
        scale: None: 1 / sqrt(head_size).

    Returns:
        [batch, length, heads, head_size].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.ops.gcu.attention(q, k, v, scale=scale).transpose(1, 2)


class GcuAttentionImpl(AttentionImpl):
    """One layer. `writes`: whether `forward` stores the step's keys and values, or another operation did."""

    writes: ClassVar[bool] = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if attn_type in ENCODER and alibi_slopes is not None:
            raise UnsupportedFeatureError(
                "GCU_ATTN has no ALiBi for encoder layers. Choose vLLM's own kernel: "
                "attention_config={'backend': 'CPU_ATTN'}."
            )
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.scale, self.sinks = float(scale), sinks
        self.sliding_window = sliding_window
        self.settings: dict[str, Any] = {
            "scale": self.scale,
            "window": sliding_window,
            "soft_cap": float(logits_soft_cap or 0.0),
            "alibi_slopes": None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32),
            "sinks": sinks,
        }
        self._layer: Layer | None = None
        self._cache, self._address = None, 0  # what it was made for

    def layer_of(self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor) -> Layer:
        """What of the layer stays from step to step, made once for a cache."""
        if kv_cache is not self._cache or kv_cache.data_ptr() != self._address or query.dtype is not self._layer.dtype:
            views = pages(kv_cache, layer.head_size, layer.head_size_v)
            stored = getattr(layer, "gcu_kv_scales", None)  # of the checkpoint, in the place of calculated ones
            if stored is not None:
                views = {"k_cache": views["k_cache"], "v_cache": views["v_cache"], **stored}
            self._layer = Layer(query.dtype, self.num_heads, **views, **self.settings)
            self._cache, self._address = kv_cache, kv_cache.data_ptr()
        return self._layer

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step: `query` [tokens, heads, head_size] -> `output` [tokens, heads, head_size_v]."""
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedFeatureError("GCU_ATTN does not quantise its output inside vLLM.")
        if attn_metadata is None:  # a profiling run: no cache yet
            return output
        m = attn_metadata
        if self.attn_type in ENCODER:
            self.encode(query, key, value, m, output)
            return output
        known = self.layer_of(layer, query, kv_cache)
        if self.writes and key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            known.write(key, value, m.step.slot_mapping)
        known.attend(query, output, m.step)
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """The write alone, where it is an operation of its own and no rule joined it to another."""
        if kv_cache.numel():
            self.layer_of(layer, key, kv_cache).write(key, value, slot_mapping[: key.shape[0]])

    def encode(self, query, key, value, m: Metadata, output: torch.Tensor) -> None:
        """Bidirectional attention of each sequence over itself. A window reaches both ways."""
        settings = {**self.settings, "window": None}
        starts = m.query_start_loc.tolist()
        for begin, end in zip(starts, starts[1:], strict=False):
            bias = None
            if self.sliding_window is not None and end - begin > self.sliding_window:
                place = torch.arange(end - begin, device=query.device)
                bias = (place.unsqueeze(1) - place).abs() < self.sliding_window
            q, k, v = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            output[begin:end] = torch.ops.gcu.attention(q, k, v, bias, **settings)[0].transpose(0, 1)


class GcuWrittenImpl(GcuAttentionImpl):
    """One layer whose keys and values are in the cache before `forward`."""

    writes = False


class GcuWrittenBackend(GcuAttentionBackend):
    """The same for layers whose write is an operation of vLLM's graph; `compilation.writes_apart` says which do."""

    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_impl_cls() -> type[GcuAttentionImpl]:
        return GcuWrittenImpl
