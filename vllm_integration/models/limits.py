"""Lengths beyond which a model would compute something that is not implemented here."""

from __future__ import annotations

from vllm.config import VllmConfig

from gcu_compile.errors import UnsupportedFeatureError


def refuse_beyond(vllm_config: VllmConfig, key: str, flags: list[str]) -> None:
    """Refuse sequences longer than `key` of the configuration, where the `flags` of config.json begin to act.

    vLLM derives `max_model_len` from the configuration, so that only a user's word is refused.

    Raises:
        UnsupportedFeatureError: names the flags, and the length that is served.
    """
    asked, length = vllm_config.model_config.max_model_len, getattr(vllm_config.model_config.hf_config, key)
    if flags and asked > length:
        raise UnsupportedFeatureError(
            f"max_model_len {asked} is above {key} {length}, where {' and '.join(flags)} of config.json would act, and "
            f"is not implemented. Serve up to {length} tokens."
        )
