"""Int8 KV caches with the scales of the checkpoint: compressed-tensors' `kv_cache_scheme`, which vLLM reads for fp8.

    {"num_bits": 8, "type": "int", "strategy": "tensor" | "attn_head", "symmetric": true | false, "dynamic": false}

    scheme without "dynamic"    -> one scale (and zero point) per layer, or per KV head, as stored
    "dynamic": true, or none    -> a scale per token and head, calculated as keys and values are written

A checkpoint that declares such a scheme is served with an int8 cache without being asked to.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsKVCacheMethod,
)

from gcu_compile.errors import UnsupportedFeatureError
from vllm_integration.behaviours import KV_CACHE_DTYPES

STRATEGIES = ("tensor", "attn_head")


class Int8KVCacheMethod(CompressedTensorsKVCacheMethod):
    """Loads k_scale, v_scale and their zero points; `layer.gcu_kv_scales` has them for `gcu::write_kv` and
    `gcu::paged_attention`, if the layer's cache is int8."""

    @staticmethod
    def validate_kv_cache_scheme(kv_cache_scheme) -> None:
        strategy = kv_cache_scheme.get("strategy")
        if strategy == "attn_head" and not kv_cache_scheme.get("symmetric", True):
            raise UnsupportedFeatureError("int8 kv_cache_scheme with a zero point per head: expected symmetric ones")
        if strategy not in STRATEGIES:
            raise UnsupportedFeatureError(
                f"int8 kv_cache_scheme with strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}"
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        found = {}
        for name in ("k", "v"):
            scale = getattr(layer, f"{name}_scale").detach().float().flatten()
            if not (scale > 0).all():
                raise UnsupportedFeatureError(f"{layer.layer_name}.{name}_scale is not above 0: {scale.tolist()}")
            found[f"{name}_scale"] = scale.clone()
            if not self.quant_config.kv_cache_scheme.get("symmetric", True):
                point = getattr(layer, f"{name}_zero_point").detach().flatten()
                found[f"{name}_zero_point"] = point.round().to(torch.int32)
        super().process_weights_after_loading(layer)
        if layer.kv_cache_dtype == KV_CACHE_DTYPES["int8"]:
            layer.gcu_kv_scales = found
