"""A model for cross-compilation: its config alone, through transformers, on FakeTensors. No weights are read or made.

    with FakeTensorMode() as mode:
        model = build(read_config("model-folder"), "bf16")
        steps = {"prefill": step(model, 1, 2048, 2048), "decode": step(model, 1, 1, 2048)}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gcu_compile.codegen.device import DEVICE
from gcu_compile.errors import CheckpointError, UnknownNameError, UnsupportedFeatureError

FORMATS = ("bf16", "fp16", "w4a16")
GROUP_SIZE = 128
LAYOUT = "gptq_int4"
# Models that build their mask from the sequence's length (ALiBi): their cache grows by concatenation.
GROWING = ("bloom",)
# Modules whose weights stay 16-bit in a 4-bit checkpoint: the head, and what chooses experts.
KEPT = ("lm_head", "gate", "embed_out")


def read_config(source: str | Path | dict[str, Any]) -> Any:
    """transformers' config of a model folder, a config.json, or a mapping with the same contents.

    Raises:
        CheckpointError: no such file, not JSON, or without `model_type`.
        UnsupportedFeatureError: transformers is missing, or does not know the model type.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UnsupportedFeatureError(
            "cross-compilation reads model definitions from transformers, which is missing: pip install transformers"
        ) from error
    values = source if isinstance(source, dict) else _read(Path(source))
    kind = values.get("model_type")
    if not kind:
        raise CheckpointError(f"{source}: the config names no model_type")
    try:
        return AutoConfig.for_model(**values)
    except (ValueError, KeyError) as error:
        raise UnsupportedFeatureError(f"transformers has no model type {kind!r}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} holds no readable config.json: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a mapping")
    return values


def build(config: Any, weights: str = "bf16") -> torch.nn.Module:
    """The model on FakeTensors of the device; call it inside a FakeTensorMode.

    Args:
        weights: one of `FORMATS`; w4a16 has 4-bit weights (GPTQ layout, groups of 128) and bf16 activations.

    Raises:
        UnknownNameError: no such format.
        UnsupportedFeatureError: no causal language model of this type.
    """
    if weights not in FORMATS:
        raise UnknownNameError("weight format", weights, FORMATS)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    dtype = torch.float16 if weights == "fp16" else torch.bfloat16
    try:
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise UnsupportedFeatureError(f"no causal language model of type {config.model_type!r}: {error}") from error
    model.requires_grad_(False)
    return quantised(model) if weights == "w4a16" else model


class W4A16Linear(torch.nn.Module):
    """A linear layer of 4-bit weights in groups, as `gcu::dequant_gemm` takes it."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        from gcu_compile.kernels.dequant_gemm.layouts import get

        layout, like = get(LAYOUT), linear.weight
        shape = layout.shape(linear.out_features, linear.in_features)
        groups = linear.in_features // GROUP_SIZE
        self.weight = torch.nn.Buffer(torch.empty(shape, dtype=layout.word, device=like.device))
        self.scales = torch.nn.Buffer(torch.empty((groups, linear.out_features), dtype=like.dtype, device=like.device))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.gcu.dequant_gemm(x, self.weight, self.scales, None, None, self.bias, layout=LAYOUT)


def quantised(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with every linear layer of whole groups replaced by a 4-bit one, but for `KEPT`."""
    for module in list(model.modules()):
        for child, layer in list(module.named_children()):
            fits = isinstance(layer, torch.nn.Linear) and layer.in_features % GROUP_SIZE == 0
            if fits and child not in KEPT:
                setattr(module, child, W4A16Linear(layer))
    return model


def step(model: torch.nn.Module, batch: int, tokens: int, context: int) -> dict[str, Any]:
    """Arguments of one forward pass.

    Args:
        batch: sequences. tokens: new tokens of each. context: length of the key and value cache.
    """
    from transformers import StaticCache

    if model.config.model_type in GROWING:
        return _growing(model, batch, tokens, context)
    with torch.device(DEVICE), torch.no_grad():
        seen = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
        cache = StaticCache(config=model.config, max_cache_len=context)
        for static, layer in zip(cache.layers, seen.layers, strict=True):
            keys, values = (part.expand(batch, -1, -1, -1) for part in (layer.keys, layer.values))
            static.lazy_initialization(keys, values)
        arguments = {
            "input_ids": torch.zeros(batch, tokens, dtype=torch.long),
            "position_ids": torch.arange(tokens).expand(batch, tokens),
            "attention_mask": torch.ones(batch, 1, tokens, context, dtype=torch.bool),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
    return arguments


def _growing(model: torch.nn.Module, batch: int, tokens: int, context: int) -> dict[str, Any]:
    """The same with a cache that is concatenated: for models that need to see a mask of one length per step."""
    with torch.device(DEVICE), torch.no_grad():
        past = None
        if tokens < context:
            past = model(input_ids=torch.zeros(batch, 1, dtype=torch.long), use_cache=True).past_key_values
            for layer in past.layers:
                for part in ("keys", "values"):
                    one = getattr(layer, part)[:, :, :1]
                    setattr(layer, part, one.expand(-1, -1, context - tokens, -1).contiguous())
        length = tokens if past is None else context
        arguments = {
            "input_ids": torch.zeros(batch, tokens, dtype=torch.long),
            "attention_mask": torch.ones(batch, length, dtype=torch.long),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        return arguments if past is None else {**arguments, "past_key_values": past}
