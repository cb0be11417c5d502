"""Calls `rejection_kernel.py`."""

from __future__ import annotations

import torch

from gcu_compile.kernels.triton.configs import configs
from gcu_compile.kernels.triton.launch import launch, target_of
from gcu_compile.kernels.triton.sample import Arguments, sizes, words


def run(logits: torch.Tensor, draft_ids: torch.Tensor, draft_probabilities: torch.Tensor, **settings) -> torch.Tensor:
    """The token of each draft's row; see `sampling/rejection_eager.py`, `tokens`."""
    from gcu_compile.kernels.triton.rejection_kernel import rejection_kernel

    found = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    if len(logits):
        config = configs("sample", target_of(logits))[0]
        arguments = Arguments(logits, settings)
        numbers = (words(settings[name], logits.device) for name in ("seeds", "positions"))
        drafts, probabilities = draft_ids.to(torch.int32).contiguous(), draft_probabilities.float().contiguous()
        launch(
            rejection_kernel, (len(logits),), config, found, logits, drafts, probabilities, *numbers,
            *arguments.chain, *arguments.row, exact=True, **sizes(config),
        )  # fmt: skip
    return found.long()
