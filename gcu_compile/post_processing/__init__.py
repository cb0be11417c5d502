"""The logits chain in plain torch, in vLLM's order. Each function takes and gives what its type says.

    from gcu_compile import post_processing as pp

    def step(logits):                                             # [rows, vocab]
        x = pp.temperature(logits, 0.8)                           # Logits
        x = pp.top_p(pp.top_k(pp.min_p(x, 0.02), 50), 0.9)        # Logits, what is cut at -inf
        return pp.draw(pp.softmax(x))                             # Probabilities -> Ids [rows, 1]

    torch.compile(step, backend="gcu", options={"enable_rules": ["sample_chain"]})

These are ordinary torch: they run anywhere, and any part of the chain may be left out or written otherwise. With the
rule `sample_chain` switched on the compiled chain is one `gcu::sample`, without a sort.
"""

from __future__ import annotations

from typing import Annotated

import torch

Logits = Annotated[torch.Tensor, "[rows, vocab] floating"]
Mask = Annotated[torch.Tensor, "[rows, vocab] bool, True: forbidden"]
Probabilities = Annotated[torch.Tensor, "[rows, vocab] float32, rows sum to 1"]
Ids = Annotated[torch.Tensor, "[rows, 1] int64"]


def forbid(logits: Logits, mask: Mask) -> Logits:
    """-inf where the mask says so: allowed tokens, grammars, bad words, stop tokens before min_tokens."""
    return logits.masked_fill(mask, -torch.inf)


def penalise(
    logits: Logits, counts: torch.Tensor, prompt: torch.Tensor, repetition: float, frequency: float, presence: float
) -> Logits:
    """vLLM's penalties. counts: [rows, vocab] occurrences in the output; prompt: [rows, vocab] bool."""
    x = logits.float()
    x = torch.where((counts > 0) | prompt, torch.where(x > 0, x / repetition, x * repetition), x)
    return x - frequency * counts - presence * (counts > 0)


def temperature(logits: Logits, value: float) -> Logits:
    """logits / value in float32; value > 0."""
    return logits.float() / value


def min_p(logits: Logits, share: float) -> Logits:
    """Cuts tokens whose probability is less than `share` of the largest one."""
    p = logits.softmax(-1)
    return logits.masked_fill(p < share * p.amax(-1, keepdim=True), -torch.inf)


def top_k(logits: Logits, k: int) -> Logits:
    """Cuts what is less than the k-th largest; k is at most the vocabulary's size."""
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def top_p(logits: Logits, p: float) -> Logits:
    """Keeps the shortest prefix, by descending probability, that reaches p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    cut = probabilities.cumsum(-1) - probabilities >= p
    return logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -torch.inf)


def softmax(logits: Logits) -> Probabilities:
    """In float32."""
    return logits.softmax(-1, dtype=torch.float32)


def draw(probabilities: Probabilities) -> Ids:
    """One token per row, by torch's generator."""
    return torch.multinomial(probabilities, 1)


def greedy(logits: Logits) -> Ids:
    """The largest logit of each row."""
    return logits.argmax(-1, keepdim=True)
