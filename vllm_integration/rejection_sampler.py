"""vLLM's rejection sampler on `gcu::sample` and `gcu::rejection_sample`: drafts verified in the model's own precision.

    SamplingMetadata, expanded from requests to the rows of logits (each draft's, then the bonus token's)
        -> drafts without probabilities: one gcu::sample over all rows, whose tokens accept the drafts that they equal
        -> drafts with probabilities: gcu::sample for the bonus rows, gcu::rejection_sample for the drafts'

What these do not cover goes through vLLM's own in float32; that is logged once per reason and counted in the sampler's
`fallbacks`.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from gcu_compile.kernels import direct
from gcu_compile.kernels.sampling import rejection_eager
from vllm_integration.chain import Rows
from vllm_integration.sampler import GcuSampler, logprobs_tensors


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
        rows, device = rows_of(metadata), logits.device
        take = self.sampler.settings
        seeds, positions = self.sampler.randomness(sampling_metadata, len(metadata.num_draft_tokens))
        owner, place = torch.from_numpy(rows.request), torch.from_numpy(rows.place)
        seeds, positions = seeds[owner].to(device), (positions[owner] + place).to(device)
        is_bonus = rows.place == np.array(metadata.num_draft_tokens)[rows.request]
        drafts, bonus = (torch.from_numpy(np.flatnonzero(part)).to(device) for part in (~is_bonus, is_bonus))
        offsets = torch.from_numpy(np.cumsum([0, *metadata.num_draft_tokens])).to(device)
        ids, length = metadata.draft_token_ids.long(), metadata.max_spec_len
        if draft_probs is None:
            asked = take(sampling_metadata, logits, rows)
            found = direct.sample(logits, seeds, positions, **asked)
            tokens = rejection_eager.assemble(found[drafts], ids, offsets, found[bonus], length)
        else:
            bonus_logits, draft_logits = logits[bonus], logits[drafts]
            asked = take(sampling_metadata, bonus_logits, rows.take(is_bonus))
            found = direct.sample(bonus_logits, seeds[bonus], positions[bonus], **asked)
            asked = take(sampling_metadata, draft_logits, rows.take(~is_bonus))
            numbers = seeds[drafts], positions[drafts], length, draft_probs
            tokens = torch.ops.gcu.rejection_sample(draft_logits, ids, offsets, found, *numbers, **asked)
        return SamplerOutput(
            sampled_token_ids=tokens.to(torch.int32),
            logprobs_tensors=self._scores(metadata, logits, tokens, sampling_metadata, rows),
        )

    def _scores(self, metadata: SpecDecodeMetadata, logits, tokens, sampling_metadata: SamplingMetadata, rows: Rows):
        """Scores of each of `tokens` [requests, length + 1], of token 0 where there is none; vLLM leaves those out."""
        if sampling_metadata.max_num_logprobs is None:
            return None
        first = np.cumsum(metadata.num_draft_tokens) - metadata.num_draft_tokens + np.arange(len(tokens))
        each = np.minimum(first[:, None] + np.arange(tokens.shape[1]), len(logits) - 1).flatten()
        shown = logits[torch.from_numpy(each).to(logits.device)]
        mode = self.sampler.logprobs_mode
        asked = self.sampler.settings(sampling_metadata, shown, rows.take(each)) if mode.startswith("processed") else {}
        return logprobs_tensors(shown, tokens.flatten().clamp(min=0), sampling_metadata, mode, asked)

    def refuses(self, metadata: SamplingMetadata) -> str | None:
        """Why this batch cannot go through our operations, or None."""
        if self.synthetic_mode:
            return "synthetic acceptance rates"
        if metadata.logprob_token_ids:
            return "logprob_token_ids together with speculative decoding"
        return self.sampler.refuses(metadata)


def rows_of(metadata: SpecDecodeMetadata) -> Rows:
    """The rows of logits: each request's drafts, then its bonus row."""
    counts = np.array(metadata.num_draft_tokens)
    request = np.repeat(np.arange(len(counts)), counts + 1)
    first = np.cumsum(counts + 1) - (counts + 1)
    return Rows(request, np.arange(len(request)) - first[request])
