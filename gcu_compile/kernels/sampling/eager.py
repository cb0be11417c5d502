"""What `gcu::sample` means, in plain torch: sorted, in float64, easy to check.

Order and semantics are those of vLLM's sampler: mask, bias (logit bias, bad words, min-tokens), penalties,
temperature, min-p, top-k, top-p, softmax, draw. Where vLLM leaves it open, this says it:

- A kept set holds whole tokens in descending order of logits; equal logits stand in ascending order of ids.
- top-k keeps exactly k; top-p the shortest prefix whose probability, among what top-k kept, reaches p.
- A NaN logit counts as -inf; a row with nothing left gives id 0.
- The draw is the inverse distribution in ascending order of ids at one Philox number per row, keyed by the
  row's seed and position: no other row, and no order of rows, has a part in it.
"""

from __future__ import annotations

import torch

GREEDY = 1e-5  # temperatures below are greedy; vLLM's _SAMPLING_EPS


def adjusted(
    logits,
    forbidden=None,
    bias_offsets=None,
    bias_ids=None,
    bias_values=None,
    history_offsets=None,
    history_ids=None,
    history_counts=None,
    repetition=None,
    frequency=None,
    presence=None,
):
    """Logits after mask, bias and penalties, in float32: [rows, vocab]. Arguments as in `sample`."""
    minus = torch.tensor(-torch.inf, device=logits.device)
    z = logits.float().clone()
    z = torch.where(z.isnan(), minus, z)
    if forbidden is not None:
        z = z.masked_fill(forbidden, -torch.inf)
    if bias_offsets is not None:
        rows = _rows(bias_offsets, len(bias_ids))
        z.index_put_((rows, bias_ids.long()), bias_values, accumulate=True)
        z = torch.where(z.isnan(), minus, z)
    if history_offsets is not None:
        rows, ids, counts = _rows(history_offsets, len(history_ids)), history_ids.long(), history_counts.float()
        value = z[rows, ids]
        value = torch.where(value > 0, value / repetition[rows], value * repetition[rows])
        value = value - frequency[rows] * counts
        value = value - torch.where(counts > 0, presence[rows], 0.0)
        z[rows, ids] = torch.where(value.isnan(), minus, value)
    return z


def _rows(offsets, length):
    """Row of each of `length` elements of a list of lists that is stored flat: offsets [0, 2, 2, 3] -> [0, 0, 2]."""
    return torch.searchsorted(offsets, torch.arange(length, device=offsets.device), right=True) - 1


def kept_set(z, temperature=None, top_k=None, top_p=None, min_p=None):
    """The tokens that may be drawn, [rows, vocab] bool, and their weights exp((z - max) / T) in float64."""
    rows, vocab = z.shape
    maximum = z.max(dim=-1, keepdim=True).values.double()
    t = torch.zeros(rows, device=z.device) if temperature is None else temperature
    greedy = t < GREEDY
    divisor = torch.where(greedy, 1.0, t).double().unsqueeze(1)
    wide = z.double()
    weights = torch.where(wide == maximum, 1.0, ((wide - maximum) * (1 / divisor)).exp())
    weights = torch.where(wide == -torch.inf, 0.0, weights)
    kept = wide > -torch.inf
    if min_p is not None:
        kept &= weights >= min_p.double().unsqueeze(1)
    order = z.argsort(dim=-1, descending=True, stable=True)
    kept_sorted, weights_sorted = kept.gather(1, order), weights.gather(1, order)
    if top_k is not None:
        k = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).unsqueeze(1)
        kept_sorted = kept_sorted & (torch.arange(vocab, device=z.device) < k)
    if top_p is not None:
        sums = torch.where(kept_sorted, weights_sorted, 0.0).cumsum(-1)
        before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
        goal = top_p.double().unsqueeze(1) * sums[:, -1:]
        limited = kept_sorted & ((before < goal) | (torch.arange(vocab, device=z.device) == 0))
        kept_sorted = torch.where(top_p.unsqueeze(1) < 1, limited, kept_sorted)
    kept_sorted = torch.where(greedy.unsqueeze(1), torch.arange(vocab, device=z.device) == 0, kept_sorted)
    kept = torch.zeros_like(kept).scatter(1, order, kept_sorted) & (wide > -torch.inf)
    return kept, weights


def uniform(seeds: torch.Tensor, positions: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al. 2011): 53 bits at key `seed`, counter (`position`, `stream`), as float64 in [0, 1).

    Args:
        seeds, positions: [rows] int64.
        stream: 0 for the draw of a token, 1 for the acceptance of a draft token.
    """
    low = 0xFFFFFFFF

    def multiply(x, constant):
        """High and low half of a 32 x 32 bit product; int64 wraps, and keeps all 64 bits."""
        product = x * constant
        return (product >> 32) & low, product & low

    c = [positions & low, (positions >> 32) & low, torch.full_like(positions, stream), torch.zeros_like(positions)]
    k = [seeds & low, (seeds >> 32) & low]
    for _ in range(10):
        (p_high, p_low), (q_high, q_low) = multiply(c[0], 0xD2511F53), multiply(c[2], 0xCD9E8D57)
        c = [q_high ^ c[1] ^ k[0], q_low, p_high ^ c[3] ^ k[1], p_low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return (((c[0] << 21) | (c[1] >> 11)) & ((1 << 53) - 1)).double() * 2.0**-53


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    forbidden: torch.Tensor | None = None,
    bias_offsets: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias_values: torch.Tensor | None = None,
    history_offsets: torch.Tensor | None = None,
    history_ids: torch.Tensor | None = None,
    history_counts: torch.Tensor | None = None,
    repetition: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    presence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: [rows, vocab] float32, bfloat16 or float16, as the model made them.
        seeds, positions: [rows] int64, key and counter of the row's random number.
        temperature: [rows] float32; below 1e-5, or without this argument, the row is greedy.
        top_k: [rows] int32; 0 or more than `vocab`: all.
        top_p, min_p: [rows] float32.
        forbidden: [rows, vocab] bool.
        bias_offsets: [rows + 1] int64; row r adds bias_values[o[r]:o[r+1]] (float32, -inf forbids) to the
            logits at bias_ids[o[r]:o[r+1]] (int32, ascending).
        history_offsets: [rows + 1] int64; tokens of the prompt and the output, history_ids (int32, ascending
            and unique in a row), with history_counts (int32) of occurrences in the output.
        repetition, frequency, presence: [rows] float32, needed with a history.

    Returns:
        [rows] int64 token ids.
    """
    z = adjusted(
        logits,
        forbidden,
        bias_offsets,
        bias_ids,
        bias_values,
        history_offsets,
        history_ids,
        history_counts,
        repetition,
        frequency,
        presence,
    )
    kept, weights = kept_set(z, temperature, top_k, top_p, min_p)
    return draw(torch.where(kept, weights, 0.0), uniform(seeds, positions))


def draw(mass: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first id at which the cumulative mass [rows, vocab] exceeds u [rows] times the whole; all float64."""
    sums = mass.cumsum(-1)
    goal = u.to(sums.device).unsqueeze(1) * sums[:, -1:]
    first = (sums <= goal).sum(-1)
    last = torch.where(mass > 0, torch.arange(mass.shape[1], device=mass.device), 0).max(-1).values
    return torch.minimum(first, last)
