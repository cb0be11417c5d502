"""Calls `logprobs_kernel.py`."""

from __future__ import annotations

import torch

from gcu_compile.kernels.triton import sample
from gcu_compile.kernels.triton.configs import configs
from gcu_compile.kernels.triton.launch import launch, target_of

MOST = 256  # of the best: each is a pass over the row


def refuses(logits: torch.Tensor, token_ids: torch.Tensor, count: int, *args, **kwargs) -> str | None:
    """Why the Triton kernel cannot take these arguments, or None."""
    if min(count, logits.shape[1]) > MOST:
        return f"the {count} best of a row; the kernel finds up to {MOST}, a pass each"
    return sample.refuses(logits)


def run(logits: torch.Tensor, token_ids: torch.Tensor, count: int, normalised: bool, **settings):
    """`gcu::logprobs`; see `sampling/logprobs_eager.py`. A token outside the vocabulary scores -inf."""
    from gcu_compile.kernels.triton.logprobs_kernel import logprobs_kernel

    (rows, vocab), given, device = logits.shape, token_ids.shape[1], logits.device
    count = min(count, vocab)
    ids = torch.empty(rows, given + count, dtype=torch.int32, device=device)
    scores = torch.empty(rows, given + count, device=device)
    ranks = torch.empty(rows, dtype=torch.int32, device=device)
    if rows:
        config = configs("sample", target_of(logits))[0]
        arguments = sample.Arguments(logits, settings)
        launch(
            logprobs_kernel, (rows,), config, ids, scores, ranks, logits, token_ids.to(torch.int32).contiguous(),
            *arguments.chain, *arguments.row, given, count, exact=True, NORMALISED=normalised, **sample.sizes(config),
        )  # fmt: skip
    return ids, scores, ranks.long()
