"""What `gcu::rejection_sample` means, in plain torch: speculative decoding's acceptance of draft tokens.

Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv:2211.17192): a draft token d is
accepted with probability min(1, p(d) / q(d)), p the target's and q the draft's distribution; otherwise the token is
drawn from max(p - q, 0). What comes out is distributed as p. A request's tokens end with the first that was not
accepted, or with the bonus token. As in vLLM, but for two things that it leaves open:

- Drafts without probabilities (n-grams) stand for q(d) = 1. Then drawing one token x from p and accepting d where
  x = d is the same distribution, and x is what `gcu::sample` draws at this seed and position: a seeded request gets the
  same tokens with and without speculation.
- p is the float64 one of `gcu::sample`'s kept set, and randomness is Philox at (seed, position): stream 0 draws, stream
  1 accepts.
"""

from __future__ import annotations

import torch

from gcu_compile.kernels.sampling import eager

CHAIN = ("temperature", "top_k", "top_p", "min_p")
NOTHING = -1  # in the result: no token


def tokens(logits, draft_ids, seeds, positions, draft_probabilities=None, **settings) -> torch.Tensor:
    """The token of each draft's row: the draft token where it is accepted, else another. [drafts] int64."""
    if draft_probabilities is None:
        return eager.sample(logits, seeds, positions, **settings)
    z = eager.adjusted(logits, **{name: value for name, value in settings.items() if name not in CHAIN})
    kept, weights = eager.kept_set(z, **{name: settings.get(name) for name in CHAIN})
    mass = torch.where(kept, weights, 0.0)
    p, q = mass / mass.sum(-1, keepdim=True), draft_probabilities.double()
    drafts = draft_ids.long().unsqueeze(1)
    p_draft, q_draft = p.gather(1, drafts).squeeze(1), q.gather(1, drafts).squeeze(1)
    accept = eager.uniform(seeds, positions, stream=1).to(p.device)
    # Greedy rows keep one token: they accept exactly that one, whatever the draft thought of it.
    greedy = torch.ones_like(accept, dtype=torch.bool)
    if settings.get("temperature") is not None:
        greedy = settings["temperature"] < eager.GREEDY
    rest = (p - q).clamp(min=0)
    accepted = torch.where(greedy, p_draft > 0, (q_draft > 0) & (p_draft >= accept * q_draft))
    accepted |= ~greedy & (rest.sum(-1) == 0)  # nothing else is left: rounding
    other = eager.draw(torch.where(greedy.unsqueeze(1), p, rest), eager.uniform(seeds, positions))
    return torch.where(accepted, draft_ids.long(), other)


def assemble(found, draft_ids, offsets, bonus_ids, length: int) -> torch.Tensor:
    """A request's tokens up to the first that is not its draft, or with the bonus, then -1: [requests, length + 1]."""
    requests, device = len(bonus_ids), found.device
    out = torch.full((requests, length + 1), NOTHING, dtype=torch.int64, device=device)
    row = torch.searchsorted(offsets, torch.arange(len(found), device=device), right=True) - 1
    place = torch.arange(len(found), device=device) - offsets[row]
    same = torch.ones(requests, length + 1, dtype=torch.bool, device=device)
    same[row, place + 1] = found == draft_ids
    reached = same.int().cumprod(dim=1).bool()  # the tokens before were all accepted
    out[row, place] = torch.where(reached[row, place], found, NOTHING)
    each = torch.arange(requests, device=device)
    count = offsets.diff()
    out[each, count] = torch.where(reached[each, count], bonus_ids.long(), NOTHING)
    return out


def rejection_sample(
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    draft_offsets: torch.Tensor,
    bonus_ids: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    length: int,
    draft_probabilities: torch.Tensor | None = None,
    **settings: torch.Tensor | None,
) -> torch.Tensor:
    """Tokens of each request after verifying its drafts.

    Args:
        logits: [drafts, vocab], the target's at each draft token's place, in the model's dtype.
        draft_ids: [drafts] int64, those of request r at draft_offsets[r] ... draft_offsets[r + 1].
        draft_offsets: [requests + 1] int64.
        bonus_ids: [requests] int64, the token behind all drafts, drawn beforehand by `gcu::sample`.
        seeds, positions: [drafts] int64, as in `gcu::sample`.
        length: the largest number of drafts of a request.
        draft_probabilities: [drafts, vocab] float32, or None.
        settings: those of `gcu::sample`, per draft.

    Returns:
        [requests, length + 1] int64; -1 behind a request's last token.
    """
    found = tokens(logits, draft_ids, seeds, positions, draft_probabilities, **settings)
    return assemble(found, draft_ids.long(), draft_offsets, bonus_ids, length)
