"""What `gcu::logprobs` means, in plain torch: scores of tokens in the logits' own precision, sorted, easy to check.

The modes of vLLM are two choices: log-probabilities or logits, of the model's logits as they are (raw) or after the
chain of `gcu::sample` (processed: its settings are given). Where vLLM leaves it open, this says it:

- Best comes first: by descending logit, equal ones in ascending order of ids; what the chain cut (-inf) stands behind,
  by id. The rank of a token is the number of kept tokens whose logit is not below its own; `vocab` if it was cut.
- A NaN logit counts as -inf. In a row with nothing left everything is -inf.
- A greedy row is shown at temperature 1, as in vLLM.
"""

from __future__ import annotations

import torch

from gcu_compile.kernels.sampling import eager
from gcu_compile.kernels.sampling.rejection_eager import CHAIN


def logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    count: int,
    normalised: bool,
    **settings: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of given tokens and of the best of each row.

    Args:
        logits: [rows, vocab] float32, bfloat16 or float16, as the model made them.
        token_ids: [rows, given] int64.
        count: how many of the best; more than `vocab` means all.
        normalised: log-probabilities, else logits (divided by the temperature, if there is one).
        settings: those of `gcu::sample`; without any the scores are raw.

    Returns:
        ids: [rows, given + count] int32, the given tokens first.
        scores: [rows, given + count] float32.
        ranks: [rows] int64, of each row's first given token, from 1.
    """
    z = eager.adjusted(logits, **{name: value for name, value in settings.items() if name not in CHAIN})
    chain = {name: settings.get(name) for name in CHAIN}
    t = torch.ones(len(z), device=z.device) if chain["temperature"] is None else chain["temperature"]
    chain["temperature"] = t = torch.where(t < eager.GREEDY, 1.0, t)
    kept, weights = eager.kept_set(z, **chain)
    maximum = z.max(dim=-1, keepdim=True).values.double()
    if normalised:
        distance = torch.where(z == maximum, 0.0, z.double() - maximum) / t.double().unsqueeze(1)
        scores = distance - torch.where(kept, weights, 0.0).sum(-1, keepdim=True).log()
    else:
        scores = z / t.unsqueeze(1)
    scores = torch.where(kept, scores, -torch.inf).float()
    shown = torch.where(kept, z, -torch.inf)
    token_ids = token_ids.long()
    best = shown.argsort(dim=-1, descending=True, stable=True)[:, :count]
    ids = torch.cat([token_ids, best], dim=1)
    first = token_ids[:, :1]
    ranks = torch.where(kept.gather(1, first), (kept & (z >= z.gather(1, first))).sum(-1, keepdim=True), z.shape[1])
    return ids.int(), scores.gather(1, ids), ranks.squeeze(1)
