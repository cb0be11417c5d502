"""`gcu-compile explain MODEL --through vllm`: a model through a vLLM engine in this process, and what became of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gcu_compile.options import env_name

# One process, so that its counters can be read; compiled anew, for a start from vLLM's cache lowers nothing.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_DISABLE_COMPILE_CACHE": "1"}
NEW_TOKENS = 4


def explain(model: str, prompt_length: int, options: Mapping[str, Any]):
    """Start an engine for the model folder, generate a few tokens, and tell what was lowered and called.

    Args:
        options: as for `torch.compile(backend="gcu")`; set as environment variables, which is how vLLM gets them.

    Returns:
        `gcu_compile.debug.explain.Explanation`; `error` is None, for vLLM has no eager result to compare with.
    """
    os.environ.update(ENVIRONMENT)
    os.environ.update({env_name(name): _text(value) for name, value in options.items()})
    from vllm import LLM, SamplingParams

    from gcu_compile.debug.explain import Watch

    watch = Watch()
    length = prompt_length + NEW_TOKENS
    llm = LLM(
        model,
        max_model_len=max(length, 64),
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 28,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompt = {"prompt_token_ids": [token % vocabulary for token in range(prompt_length)]}
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    llm.generate([prompt], sampling, use_tqdm=False)
    return watch.explanation(options)


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, (list, tuple)) else str(value)
