"""What differs between the releases of vLLM that we run with: 0.26, the last for torch 2.11, and 0.32.

Each difference is told by what is there, not by a version number: a card's vendor builds vLLM under numbers of its own.

    where the API server finds `serve_http`           `SERVERS`
    the name of an attention backend from outside     `register_attention`
    how a backend names its cache's layout and size   `cache_interface`
    stop tokens that `min_tokens` gives back          `stop_entry`
    latent attention in a backend from outside        `need_latent_attention`
    names of layers as inputs of compiled graphs      `layers_are_inputs`
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from gcu_compile.errors import UnsupportedFeatureError

SUPPORTED = ("0.26", "0.32")
# Modules whose `serve_http` the API server calls, newest first; each release has one of them.
SERVERS = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")


def register_attention(name: str, backend: str) -> str:
    """Make our attention backend known to vLLM; idempotent. Returns the name that this release gives it.

    Args:
        name: what it is called where vLLM takes new names (0.32); 0.26 has one name for all: `CUSTOM`.
        backend: dotted name of the class.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not hasattr(AttentionBackendEnum, "register"):
        register_backend(AttentionBackendEnum.CUSTOM, backend)
        return AttentionBackendEnum.CUSTOM.name
    if not hasattr(AttentionBackendEnum, name):
        register_backend(name, backend)
    return name


def need_latent_attention() -> None:
    """Raise where vLLM's layer of latent attention hands no backend from outside what ours needs: 0.26.

    Raises:
        UnsupportedFeatureError: names the ways on.
    """
    if not hasattr(importlib.import_module("vllm.model_executor.layers.attention.mla_attention"), "split_kv_b_proj"):
        raise UnsupportedFeatureError(
            "latent attention (MLA) on target host needs vLLM 0.32; this release serves it on the CPU with no backend. "
            "Set VLLM_MLA_DISABLE=1, which makes keys and values of every latent and attends to those, or upgrade."
        )


def layers_are_inputs() -> bool:
    """Whether a layer's name is an input of compiled graphs, so that an operation that takes one can stand in a piece
    that layers share: not where VLLM_USE_LAYERNAME is 0."""
    from vllm.utils import torch_utils

    return torch_utils._USE_LAYERNAME


def stop_entry(entry: tuple) -> tuple[int, list[int], set[int], bool]:
    """What `MinTokensLogitsProcessor` keeps of a request: least length, output, stop tokens, and whether it gives them
    back to rows that structured outputs leave nothing else; 0.26 has no word of the last and never does."""
    least, output, stops, *restores = entry
    return least, output, stops, any(restores)


def cache_interface(scale_bytes: int) -> type:
    """A mixin that tells vLLM how our attention backend's pages look.

    A page of a head is contiguous: all its keys, all its values, then, where the cache is int8, `scale_bytes` of scales
    for each slot. vLLM 0.26 asks for a shape and a layout; 0.32 for a layout, and for the size in its specification.
    """
    from vllm.v1 import kv_cache_interface

    layouts = getattr(kv_cache_interface, "KVCacheLayout", None)
    return _by_shape(scale_bytes) if layouts is None else _by_specification(layouts, scale_bytes)


def _by_specification(layouts: Any, scale_bytes: int) -> type:
    class Specified:
        """vLLM 0.32."""

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
            return (layouts.LBHNC,)

        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            """Room for the scales of an int8 cache."""
            if spec.state_content_bytes is not None or not spec.kv_quant_mode.is_per_token_head:
                return spec
            return replace(spec, state_content_bytes=spec.head_size + spec.head_size_v + scale_bytes)

    return Specified


def _by_shape(scale_bytes: int) -> type:
    class Shaped:
        """vLLM 0.26, which counts the scales of an int8 cache into its page by itself, and knows one head size."""

        @staticmethod
        def get_kv_cache_shape(
            num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
        ) -> tuple[int, ...]:
            scales = scale_bytes if cache_dtype_str.endswith("per_token_head") else 0
            return num_blocks, num_kv_heads, block_size, 2 * head_size + scales

        @staticmethod
        def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
            if include_num_layers_dimension:
                raise NotImplementedError  # one tensor per layer
            return 0, 1, 2, 3

        @classmethod
        def get_required_kv_cache_layout(cls) -> str:
            return "HND"

    return Shaped
