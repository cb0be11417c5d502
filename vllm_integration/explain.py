"""`gcu-compile explain MODEL --through vllm`: a model through a vLLM engine in this process, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_integration.start import engine, environment, generate

NEW_TOKENS = 4


def explain(model: str, prompt_length: int, options: Mapping[str, Any]):
    """Start an engine for the model folder, generate a few tokens, and tell what was lowered and called.

    Args:
        options: as for `torch.compile(backend="gcu")`; set as environment variables, which is how vLLM gets them.

    Returns:
        `gcu_compile.debug.explain.Explanation`; `error` is None, for vLLM has no eager result to compare with.
    """
    with environment(options):
        from gcu_compile.debug.explain import Watch

        watch = Watch()
        generate(engine(model, prompt_length + NEW_TOKENS), prompt_length, NEW_TOKENS)
        return watch.explanation(options)
