"""vLLM's sampler on `gcu::sample`: logits in the model's own precision, no sort, no [rows, vocab] copy.

    SamplingMetadata -> arguments of gcu::sample -> token ids -> vLLM's SamplerOutput

What the operation does not cover goes through vLLM's own sampler in float32; that is logged once per reason
and counted in `fallbacks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

import gcu_compile.kernels.sampling  # noqa: F401  (defines torch.ops.gcu.sample)
from gcu_compile.options import resolve
from vllm_integration import versions
from vllm_integration.behaviours import log

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
KNOWN_PROCESSORS = (LogitBiasLogitsProcessor, MinPLogitsProcessor, MinTokensLogitsProcessor)


class GcuSampler(Sampler):
    """vLLM's `Sampler` with the chain in one operation.

    Args:
        runner: the model runner; its input batch tells each row's position, which keys the row's randomness.
    """

    def __init__(self, runner: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.runner = runner
        self.original = resolve().post_processing_dtype == "original"
        self.fallbacks: Counter[str] = Counter()

    def forward(self, logits, sampling_metadata, predict_bonus_token=False, logprobs_mode_override=None):
        mode = logprobs_mode_override or self.logprobs_mode
        reason = self.refuses(sampling_metadata, mode)
        if predict_bonus_token:  # part of vLLM's own rejection sampler, which counts as one fallback
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        if reason is not None:
            self.count_fallback(reason)
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        asked = settings(sampling_metadata, *logits.shape)
        asked = {name: value.to(logits.device) for name, value in asked.items()}
        randomness = (value.to(logits.device) for value in self.randomness(sampling_metadata, len(logits)))
        ids = torch.ops.gcu.sample(logits, *randomness, **asked)
        return SamplerOutput(
            sampled_token_ids=ids.to(torch.int32).unsqueeze(-1),
            logprobs_tensors=self._logprobs(logits, ids, sampling_metadata, mode),
        )

    def count_fallback(self, reason: str) -> None:
        """Log a fallback the first time, and count it."""
        if reason not in self.fallbacks:
            log.info("Sampling in float32 by vLLM's own sampler: %s", reason)
        self.fallbacks[reason] += 1

    def refuses(self, metadata: SamplingMetadata, mode: str) -> str | None:
        """Why this batch cannot go through `gcu::sample`, or None."""
        if not self.original:
            return "post_processing_dtype is float32"
        if self.use_fp64_gumbel:
            return "use_fp64_gumbel is set"
        wants_logprobs = metadata.max_num_logprobs is not None or metadata.logprob_token_ids
        if wants_logprobs and mode.startswith("processed"):
            return f"logprobs_mode {mode} shows the processed logits of every token"
        holder = metadata.thinking_budget_state_holder
        if holder is not None and holder.has_tracked_requests():
            return "a thinking budget"
        for processor in (*metadata.logitsprocs.argmax_invariant, *metadata.logitsprocs.non_argmax_invariant):
            if not isinstance(processor, KNOWN_PROCESSORS):
                return f"the logits processor {type(processor).__name__}"
            if isinstance(processor, MinTokensLogitsProcessor) and versions.restores_stop_tokens(processor):
                return "min_tokens together with structured outputs"
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

    def _logprobs(self, logits, ids, metadata, mode) -> LogprobsTensors | None:
        """As upstream: of the raw logits, for those who asked."""
        count, of_ids = metadata.max_num_logprobs, metadata.logprob_token_ids
        if count is None and not of_ids:
            return None
        raw = self.compute_logprobs(logits) if mode == "raw_logprobs" else logits.float()
        if of_ids:
            return self.gather_specific_token_logprobs(raw, of_ids, ids)
        if count == -1:
            return LogprobsTensors(torch.empty(0), raw, torch.empty(0))
        return self.gather_logprobs(raw, count, token_ids=ids)


def settings(metadata: SamplingMetadata, rows: int, vocab: int, more: Sequence[Triple] = ()) -> dict[str, torch.Tensor]:
    """Arguments of `gcu::sample` that say what the batch's requests ask for; what nobody asks for is absent.

    Args:
        more: biases beside the processors' own: rows, token ids and values.
    """
    found: dict[str, torch.Tensor | None] = {
        "temperature": metadata.temperature,
        "top_k": metadata.top_k,
        "top_p": metadata.top_p,
        "forbidden": metadata.allowed_token_ids_mask,
    }
    triples: list[Triple] = list(more)
    for processor in (*metadata.logitsprocs.argmax_invariant, *metadata.logitsprocs.non_argmax_invariant):
        if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count:
            found["min_p"] = processor.min_p.flatten()
        elif isinstance(processor, LogitBiasLogitsProcessor) and processor.biases:
            triples.append(_triple(processor.logits_slice, processor.bias_tensor))
        elif isinstance(processor, MinTokensLogitsProcessor) and processor.min_toks:
            triples.append(_triple(processor.logits_slice, processor.neg_inf_tensor))
    if metadata.bad_words_token_ids:
        triples.append(_bad_words(metadata.bad_words_token_ids, metadata.output_token_ids))
    if triples:
        found |= _lists("bias", "values", rows, *(np.concatenate(part) for part in zip(*triples, strict=True)))
    if not metadata.no_penalties:
        found |= history(metadata, rows, vocab)
    return {name: value for name, value in found.items() if value is not None}


def _triple(where: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor):
    rows, ids = (index.cpu().numpy() for index in where)
    return rows, ids, np.broadcast_to(values.cpu().numpy(), rows.shape)


def _bad_words(words: dict[int, list[list[int]]], outputs: list[list[int]]):
    """The last token of each bad word whose beginning was just written."""
    found = [
        (row, word[-1])
        for row, row_words in words.items()
        for word in row_words
        if len(word) == 1 or (len(word) <= len(outputs[row]) + 1 and outputs[row][1 - len(word) :] == word[:-1])
    ]
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.full(len(pairs), -np.inf, dtype=np.float32)


def _lists(kind: str, values_name: str, rows: int, row, ids, values) -> dict[str, torch.Tensor]:
    """(row, id, value) triples as offsets and flat lists in order of row, then id."""
    order = np.lexsort((ids, row))
    offsets = np.searchsorted(row[order], np.arange(rows + 1))
    return {
        f"{kind}_offsets": torch.from_numpy(offsets.astype(np.int64)),
        f"{kind}_ids": torch.from_numpy(ids[order].astype(np.int32)),
        f"{kind}_{values_name}": torch.from_numpy(np.ascontiguousarray(values[order])),
    }


def history(metadata: SamplingMetadata, rows: int, vocab: int) -> dict[str, torch.Tensor]:
    """Tokens of prompt and output with their counts in the output, for the rows that have a penalty."""
    repetition, frequency = metadata.repetition_penalties, metadata.frequency_penalties
    presence = metadata.presence_penalties
    asked = ((repetition != 1) | (frequency != 0) | (presence != 0)).tolist()
    prompts = metadata.prompt_token_ids.cpu().numpy()
    all_rows, all_ids, all_counts = [], [], []
    for row in range(rows):
        if not asked[row]:
            continue
        prompt, output = prompts[row], np.array(metadata.output_token_ids[row], dtype=np.int64)
        # vLLM pads prompts with the vocabulary's size, an id that no token has.
        ids, counts = np.unique(output[output >= 0], return_counts=True)
        seen = np.setdiff1d(prompt[prompt < vocab], ids)
        all_rows += [np.full(len(ids) + len(seen), row)]
        all_ids += [ids, seen]
        all_counts += [counts, np.zeros(len(seen), dtype=np.int64)]
    empty = [np.zeros(0, dtype=np.int64)]
    flat = (np.concatenate(part or empty) for part in (all_rows, all_ids, all_counts))
    lists = _lists("history", "counts", rows, *flat)
    lists["history_counts"] = lists["history_counts"].to(torch.int32)
    return lists | {"repetition": repetition, "frequency": frequency, "presence": presence}
