"""Who asks for an int8 KV cache: the name w4a16c8 and its like, or a checkpoint's `kv_cache_scheme`."""

from __future__ import annotations

from typing import Any

from vllm_integration.behaviours import KV_CACHE_DTYPES, log

SUFFIX = "c8"


def is_int8(scheme: dict[str, Any] | None) -> bool:
    """Whether a `kv_cache_scheme` asks for int8."""
    return scheme is not None and scheme.get("type") == "int" and scheme.get("num_bits") == 8


def choose(vllm_config: Any) -> None:
    """Set the KV cache's dtype to int8 where that is asked for and the user named no dtype."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if model is None or cache is None or cache.cache_dtype != "auto":
        return
    config = getattr(model.hf_config, "quantization_config", None)
    by_name = str(model.quantization or "").endswith(SUFFIX)
    if by_name or (isinstance(config, dict) and is_int8(config.get("kv_cache_scheme"))):
        cache.cache_dtype = KV_CACHE_DTYPES["int8"]
        why = f"quantization={model.quantization}" if by_name else "the checkpoint's kv_cache_scheme"
        log.info("The KV cache is int8, as %s asks.", why)
