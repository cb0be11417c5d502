"""`gcu-compile bisect MODEL --through vllm`: which match makes a model wrong in vLLM, by halves.

Right is what the same engine says when it compiles nothing (`enforce_eager`). Both run in float32, where a wrong rule
stands out of the rounding, and take the prompt in two chunks, so that the second reads what the first wrote into the
cache. Compared are the log-probabilities of the prompt's own tokens.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch

from gcu_compile import backend, recording
from gcu_compile.debug.bisect import Culprit, search
from gcu_compile.lowering.context import MatchRecord
from vllm_integration.start import engine, environment, generate


def bisect(model: str, prompt_length: int, options: Mapping[str, Any] | None = None) -> Culprit:
    """Compare the model folder compiled with the model eager, and find the cause of a difference.

    Each run starts an engine in this process. vLLM cannot run a lowered graph without Inductor, and so what is wrong
    without any rule is told as `elsewhere`.

    Args:
        options: as for `torch.compile(backend="gcu")`.
    """
    def run(given: dict[str, Any]) -> tuple[list[torch.Tensor], list[MatchRecord]]:
        recording.restart_numbers()
        before = len(backend.reports)
        actual = _logprobs(model, prompt_length, given)
        return actual, [match for report in backend.reports[before:] for match in report.matches]

    # Code of an earlier run, whose rules may have been others, is not met.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
        expected = _logprobs(model, prompt_length, options or {}, enforce_eager=True)
        return search(run, expected, options, inductor=False)


def _logprobs(model: str, prompt_length: int, options: Mapping[str, Any], **more: Any) -> list[torch.Tensor]:
    """Of the prompt's tokens from the second on, as one tensor."""
    torch.compiler.reset()
    chunk = max(prompt_length // 2, 4)
    with environment(options):
        llm = engine(model, prompt_length + 1, dtype="float32", max_num_batched_tokens=chunk, **more)
        output = generate(llm, prompt_length, 1, prompt_logprobs=0)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return [torch.tensor([float(entry[token].logprob) for entry, token in pairs])]
