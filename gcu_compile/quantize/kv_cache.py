"""Scales of an int8 KV cache: the largest key and value that a layer's cache held while the model read some text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gcu_compile.errors import CheckpointError
from gcu_compile.quantize.source import load

TOKENS = 2048  # of one text; what is longer is cut
INT8_MAX = 127.0


def scheme(static: bool) -> dict[str, Any]:
    """`kv_cache_scheme` of compressed-tensors. Static: a scale per layer, `k_scale` and `v_scale` of its attention."""
    common = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    return common | {"strategy": "tensor" if static else "token", "dynamic": not static}


def calibrate(model: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    """Run the model in float32 on `texts`.

    Returns:
        `model.layers.N.self_attn.k_scale` and `v_scale` ([1], float32) of each layer: largest absolute key (after its
        rotation, as it is cached) and value, over 127.

    Raises:
        CheckpointError: keys or values that are not finite, or a model whose layers cache none.
    """
    from transformers import DynamicCache

    class Watched(DynamicCache):
        """A cache that remembers how far its keys and values reach."""

        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            for kind, states in (("k", key_states), ("v", value_states)):
                reach = states.abs().amax().item()
                found[layer_idx, kind] = max(found.get((layer_idx, kind), 0.0), reach)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    found: dict[tuple[int, str], float] = {}
    tokenizer, network = load(model)
    names = _attentions(network)
    with torch.no_grad():
        for text in filter(None, texts):
            ids = torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])
            network(ids, past_key_values=Watched(config=network.config), use_cache=True)
    if not found or {layer for layer, _ in found} != set(names):
        raise CheckpointError(f"{model}: the layers of this model have no keys and values of their own to calibrate")
    scales = {}
    for (layer, kind), reach in sorted(found.items()):
        if not 0 < reach < float("inf"):
            raise CheckpointError(f"{names[layer]}: the largest {kind} of the calibration is {reach}")
        scales[f"{names[layer]}.{kind}_scale"] = torch.tensor([reach / INT8_MAX])
    return scales


def _attentions(network: torch.nn.Module) -> dict[int, str]:
    """Layer index -> name of its attention module."""
    return {
        module.layer_idx: name
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in ("self_attn", "attn", "attention") and isinstance(module.layer_idx, int)
    }
