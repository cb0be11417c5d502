"""vLLM's sampler on `gcu::sample`: logits in the model's own precision, no sort, no [rows, vocab] copy.

    SamplingMetadata -> arguments of gcu::sample (chain.py) -> token ids -> vLLM's SamplerOutput
                                                             -> gcu::logprobs, for those who ask

What the operation does not cover goes through vLLM's own sampler in float32; that is logged once per reason
and counted in `fallbacks`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

import gcu_compile.kernels.sampling  # noqa: F401  (defines torch.ops.gcu.sample)
from gcu_compile.kernels import direct
from gcu_compile.options import resolve
from vllm_integration.behaviours import log
from vllm_integration.chain import KNOWN_PROCESSORS, Rows, Settings


class Unread(NamedTuple):
    """Logits whose log-probabilities are still to be computed: `gcu::logprobs` needs the tokens, too."""

    logits: torch.Tensor


class GcuSampler(Sampler):
    """vLLM's `Sampler` with the chain in one operation.

    Args:
        runner: the model runner; its input batch tells each row's position, which keys the row's randomness.
    """

    def __init__(self, runner: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.upstream = Sampler(**kwargs)
        self.runner, self.settings = runner, Settings(runner)
        self.original = resolve().post_processing_dtype == "original"
        self.fallbacks: Counter[str] = Counter()

    def forward(self, logits, sampling_metadata, predict_bonus_token=False, logprobs_mode_override=None):
        reason = self.refuses(sampling_metadata)
        if reason is not None or predict_bonus_token:  # the latter by vLLM's rejection sampler: one fallback
            if not predict_bonus_token:
                self.count_fallback(reason)
            return self.upstream(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        asked = self.settings(sampling_metadata, logits, Rows.plain(len(logits)))
        randomness = (value.to(logits.device) for value in self.randomness(sampling_metadata, len(logits)))
        ids = direct.sample(logits, *randomness, **asked)
        mode = logprobs_mode_override or self.logprobs_mode
        return SamplerOutput(
            sampled_token_ids=ids.to(torch.int32).unsqueeze(-1),
            logprobs_tensors=logprobs_tensors(logits, ids, sampling_metadata, mode, asked),
        )

    def compute_logprobs(self, logits: torch.Tensor) -> torch.Tensor | Unread:
        """The first half of what vLLM does for a prompt's log-probabilities; `gather_logprobs` does the rest."""
        return Unread(logits) if self.original else self.upstream.compute_logprobs(logits)

    def gather_logprobs(self, logprobs: torch.Tensor | Unread, num_logprobs: int, token_ids: torch.Tensor):
        """Scores of `token_ids` and of the best `num_logprobs`, and the tokens' ranks; see `gcu::logprobs`."""
        if not self.original:
            return self.upstream.gather_logprobs(logprobs, num_logprobs, token_ids)
        unread = isinstance(logprobs, Unread)
        logits = logprobs.logits if unread else logprobs
        return LogprobsTensors(*torch.ops.gcu.logprobs(logits, token_ids.unsqueeze(1), num_logprobs, unread))

    def count_fallback(self, reason: str) -> None:
        """Log a fallback the first time, and count it."""
        if reason not in self.fallbacks:
            log.info("Sampling in float32 by vLLM's own sampler: %s", reason)
        self.fallbacks[reason] += 1

    def refuses(self, metadata: SamplingMetadata) -> str | None:
        """Why this batch cannot go through `gcu::sample`, or None."""
        if not self.original:
            return "post_processing_dtype is float32"
        if self.use_fp64_gumbel:
            return "use_fp64_gumbel is set"
        holder = metadata.thinking_budget_state_holder
        if holder is not None and holder.has_tracked_requests():
            return "a thinking budget"
        for processor in (*metadata.logitsprocs.argmax_invariant, *metadata.logitsprocs.non_argmax_invariant):
            if not isinstance(processor, KNOWN_PROCESSORS):
                return f"the logits processor {type(processor).__name__}"
        return None

    def randomness(self, metadata: SamplingMetadata, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Seed and position of each row: [rows] int64 both. A row without a seed gets a fresh one each step."""
        seeds = torch.randint(0, 2**63 - 1, (rows,))
        positions = torch.zeros(rows, dtype=torch.int64)
        if metadata.generators:
            lengths = self.runner.input_batch.num_tokens_no_spec
            for row, generator in metadata.generators.items():
                seeds[row] = generator.initial_seed()
                positions[row] = int(lengths[row])
        return seeds, positions


def logprobs_tensors(logits, ids, metadata: SamplingMetadata, mode: str, asked: dict) -> LogprobsTensors | None:
    """Scores of the drawn tokens `ids` and of what the batch asks for beside them, in one of vLLM's modes.

    Args:
        logits: [rows, vocab], with `asked`, the arguments of `gcu::sample`.
        ids: [rows] int64.
    """
    count, of_ids = metadata.max_num_logprobs, metadata.logprob_token_ids
    if count is None and not of_ids:
        return None
    asked = asked if mode.startswith("processed") else {}
    normalised = mode.endswith("logprobs")
    if of_ids:
        wanted, there = _wanted(of_ids, ids)
        shown, scores, ranks = torch.ops.gcu.logprobs(logits, wanted, 0, normalised, **asked)
        return LogprobsTensors(shown, scores.masked_fill(~there, -torch.inf), ranks)
    return LogprobsTensors(*torch.ops.gcu.logprobs(logits, ids.unsqueeze(1), count, normalised, **asked))


def _wanted(of_ids: dict[int, list[int]], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The drawn token and those that each row asks for, padded: [rows, 1 + most] int64, and which are asked for."""
    width = max(map(len, of_ids.values()))
    wanted, there = np.zeros((len(ids), width), dtype=np.int64), np.zeros((len(ids), width + 1), dtype=bool)
    there[:, 0] = True
    for row, tokens in of_ids.items():
        wanted[row, : len(tokens)], there[row, 1 : len(tokens) + 1] = tokens, True
    wanted = torch.from_numpy(wanted).to(ids.device)
    return torch.cat([ids.unsqueeze(1), wanted], dim=1), torch.from_numpy(there).to(ids.device)
