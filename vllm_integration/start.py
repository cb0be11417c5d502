"""A vLLM engine in this process, compiled anew, for the tools that look inside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from gcu_compile.options import env_name

# One process, so that its counters can be read; compiled anew, for a start from vLLM's cache lowers nothing.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_DISABLE_COMPILE_CACHE": "1"}


@contextlib.contextmanager
def environment(options: Mapping[str, Any]) -> Iterator[None]:
    """Within it, engines start in this process and with these options of `torch.compile(backend="gcu")`."""
    with mock.patch.dict(os.environ, {**ENVIRONMENT, **{env_name(name): _text(v) for name, v in options.items()}}):
        yield


def engine(model: str, length: int, **more: Any) -> Any:
    """`vllm.LLM` of a model folder for a few sequences of up to `length` tokens; it makes no text."""
    from vllm import LLM

    return LLM(
        model,
        max_model_len=max(length, 64),
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 28,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **more,
    )


def generate(llm: Any, prompt_length: int, new_tokens: int, **sampling: Any) -> Any:
    """vLLM's output for one prompt of the tokens 0, 1, 2, ... and greedy sampling."""
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompt = {"prompt_token_ids": [token % vocabulary for token in range(prompt_length)]}
    asked = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **sampling)
    (output,) = llm.generate([prompt], asked, use_tqdm=False)
    return output


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, (list, tuple)) else str(value)
