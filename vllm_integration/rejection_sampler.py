"""vLLM's rejection sampler on `gcu::sample` and `gcu::rejection_sample`: drafts verified in the model's own precision.

    SamplingMetadata, expanded from requests to the rows of logits (each draft's, then the bonus token's)
        -> drafts without probabilities: one gcu::sample over all rows, whose tokens accept the drafts that they equal
        -> drafts with probabilities: gcu::sample for the bonus rows, gcu::rejection_sample for the drafts'

What these do not cover goes through vLLM's own in float32; that is logged once per reason and counted in the sampler's
`fallbacks`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from gcu_compile.kernels.sampling import rejection_eager
from vllm_integration.sampler import GcuSampler, settings


class GcuRejectionSampler(RejectionSampler):
    """vLLM's `RejectionSampler` with our operations; `sampler` is a `GcuSampler`."""

    sampler: GcuSampler

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        reason = self.refuses(sampling_metadata)
        if reason is not None:
            self.sampler.count_fallback(reason)
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        request, place = rows_of(metadata, len(logits))

        def take(which: torch.Tensor) -> dict[str, torch.Tensor]:
            of, at = request[which], place[which]
            rows = expand(sampling_metadata, metadata, of, at)
            return settings(rows, len(which), logits.shape[1], min_tokens(sampling_metadata, of, at))

        seeds, positions = self.sampler.randomness(sampling_metadata, len(metadata.num_draft_tokens))
        seeds, positions = seeds[request], positions[request] + place
        drafts, bonus = metadata.target_logits_indices.long(), metadata.bonus_logits_indices.long()
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), metadata.cu_num_draft_tokens.long()])
        ids, length = metadata.draft_token_ids.long(), metadata.max_spec_len
        if draft_probs is None:
            found = torch.ops.gcu.sample(logits, seeds, positions, **take(torch.arange(len(logits))))
            tokens = rejection_eager.assemble(found[drafts], ids, offsets, found[bonus], length)
        else:
            found = torch.ops.gcu.sample(logits[bonus], seeds[bonus], positions[bonus], **take(bonus))
            tokens = torch.ops.gcu.rejection_sample(
                logits[drafts],
                ids,
                offsets,
                found,
                seeds[drafts],
                positions[drafts],
                length,
                draft_probs,
                **take(drafts),
            )
        return SamplerOutput(sampled_token_ids=tokens.to(torch.int32), logprobs_tensors=None)

    def refuses(self, metadata: SamplingMetadata) -> str | None:
        """Why this batch cannot go through our operations, or None."""
        if self.synthetic_mode:
            return "synthetic acceptance rates"
        if metadata.max_num_logprobs is not None or metadata.logprob_token_ids:
            return "log-probabilities together with speculative decoding"
        return self.sampler.refuses(metadata, self.sampler.logprobs_mode)


def rows_of(metadata: SpecDecodeMetadata, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of logits its request, and its place among the request's drafts (the bonus row: their number)."""
    counts = torch.tensor(metadata.num_draft_tokens)
    request, place = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    each = torch.arange(len(counts))
    owner = each.repeat_interleave(counts)
    drafts, bonus = metadata.target_logits_indices.long(), metadata.bonus_logits_indices.long()
    request[drafts], request[bonus] = owner, each
    place[drafts], place[bonus] = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner], counts
    return request, place


def expand(
    metadata: SamplingMetadata, spec: SpecDecodeMetadata, request: torch.Tensor, place: torch.Tensor
) -> SamplingMetadata:
    """What each row's request asks for; a row's output holds the drafts before it. Processors are left out: of those
    that vLLM allows with drafts, only min_tokens counts, see `min_tokens`."""

    def of_row(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[request]

    outputs, words = metadata.output_token_ids, metadata.bad_words_token_ids
    if words or not metadata.no_penalties:
        drafts = np.split(spec.draft_token_ids.numpy(), np.cumsum(spec.num_draft_tokens)[:-1])
        pairs = zip(request.tolist(), place.tolist(), strict=True)
        outputs = [[*outputs[owner], *drafts[owner][:before].tolist()] for owner, before in pairs]
    return replace(
        metadata,
        temperature=of_row(metadata.temperature),
        top_p=of_row(metadata.top_p),
        top_k=of_row(metadata.top_k),
        prompt_token_ids=of_row(metadata.prompt_token_ids),
        frequency_penalties=of_row(metadata.frequency_penalties) if not metadata.no_penalties else None,
        presence_penalties=of_row(metadata.presence_penalties) if not metadata.no_penalties else None,
        repetition_penalties=of_row(metadata.repetition_penalties) if not metadata.no_penalties else None,
        output_token_ids=outputs,
        allowed_token_ids_mask=of_row(metadata.allowed_token_ids_mask),
        bad_words_token_ids={row: words[owner] for row, owner in enumerate(request.tolist()) if owner in words},
        logitsprocs=LogitsProcessors(),
    )


def min_tokens(metadata: SamplingMetadata, request: torch.Tensor, place: torch.Tensor) -> list[Any]:
    """(rows, ids, -inf) for the stop tokens of requests that are too short yet, counting the drafts before a row."""
    found = [
        (row, stop)
        for processor in metadata.logitsprocs.non_argmax_invariant
        if isinstance(processor, MinTokensLogitsProcessor)
        for row, (owner, before) in enumerate(zip(request.tolist(), place.tolist(), strict=True))
        if owner in processor.min_toks and len(processor.min_toks[owner][1]) + before < processor.min_toks[owner][0]
        for stop in processor.min_toks[owner][2]
    ]
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return [(pairs[:, 0], pairs[:, 1], np.full(len(pairs), -np.inf, dtype=np.float32))] if found else []
