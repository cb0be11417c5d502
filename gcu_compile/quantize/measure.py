"""How far a quantised layer's outputs are from the float layer's, on text that the model reads."""

from __future__ import annotations

from pathlib import Path

import torch

from gcu_compile.quantize.source import load
from gcu_compile.quantize.stored import Stored

TOKENS = 512  # of one text
ROWS = 4096  # tokens in all, with which a layer is measured


def output_errors(
    model: Path, texts: list[str], stored: Stored, linears: dict[str, tuple[int, int]]
) -> dict[str, float]:
    """|x W^T - x Q^T| / |x W^T| (Frobenius) of every linear layer of the float model `model`, run in float32.

    Args:
        texts: what it reads; the first `ROWS` tokens, at most `TOKENS` of one text.
        stored: the quantised layers.
        linears: name of each one's weight -> (N, K).

    Returns:
        Weight's name -> error; experts whose weights transformers keeps in one tensor have none.
    """
    tokenizer, network = load(model)
    found: dict[str, list[float]] = {}

    def watch(name: str):
        def hook(module: torch.nn.Linear, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            x = arguments[0].flatten(0, -2)
            exact = x @ module.weight.T
            sums = found.setdefault(name, [0.0, 0.0])
            sums[0] += (exact - x @ stored.numbers(name, linears[name]).T).square().sum().item()
            sums[1] += exact.square().sum().item()

        return hook

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in linears:
            module.register_forward_hook(watch(f"{name}.weight"))
    left = ROWS
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text)["input_ids"][: min(TOKENS, left)]
            if ids:
                network(torch.tensor([ids]), use_cache=False)
                left -= len(ids)
            if not left:
                break
    return {name: (wrong / right) ** 0.5 if right else 0.0 for name, (wrong, right) in found.items()}
