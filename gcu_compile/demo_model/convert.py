"""A Llama-architecture GGUF file becomes a Hugging Face model folder.

Weights are dequantised by the `gguf` package and stored as bf16. llama.cpp stores the q and k projections
with the two halves of each rotary pair interleaved; `unpermute` puts Hugging Face's order back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gcu_compile.errors import DemoModelError

# GGUF name within a block -> Hugging Face name within a layer.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

Progress = Callable[[int, int], None]


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's rotary order: [heads, head_dim/2, 2, in] -> [heads, 2, head_dim/2, in].

    Args:
        weight: [num_heads * head_dim, in_features].
        num_heads: of this projection (KV heads for k).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def convert(gguf_file: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Write the model of `gguf_file` into the existing, empty `folder`.

    Args:
        progress: called with (tensors done, tensors in all).

    Raises:
        DemoModelError: the file is truncated, damaged or not a Llama-architecture model.
    """
    fields, tensors = _read(gguf_file)
    if fields.get("general.architecture") != "llama":
        raise DemoModelError(
            f"{gguf_file.name}: architecture {fields.get('general.architecture')!r}, expected 'llama'"
        )
    config = model_config(fields, tied="output.weight" not in tensors)
    weights = _weights(tensors, config, gguf_file.name, progress)
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private to its owner
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(config))
    _write_tokenizer(fields, config, folder)


def _read(gguf_file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise DemoModelError(
            f"{gguf_file.name} is truncated or damaged ({error}); delete it and fetch it again"
        ) from error


def model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """`config.json` from GGUF fields, in keys that transformers 4 and 5 and vLLM all read."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # Stored as float32; seven digits give back the number that was meant (1e-05).
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _weights(tensors, config, file_name: str, progress: Progress) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, torch.Tensor] = {}
    for done, (name, tensor) in enumerate(tensors.items(), 1):
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
            part = name.split(".")[2] if name.startswith("blk.") else ""
            if part in heads:
                values = unpermute(values, heads[part])
        except (ValueError, IndexError) as error:
            raise DemoModelError(f"{file_name}: tensor {name} is damaged ({error})") from error
        weights[hugging_face_name(name)] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        progress(done, len(tensors))
    missing = [
        f"blk.{layer}.{part}.weight"
        for layer in range(config["num_hidden_layers"])
        for part in LAYER_NAMES
        if f"blk.{layer}.{part}.weight" not in tensors
    ]
    if missing:
        raise DemoModelError(f"{file_name} lacks {len(missing)} tensors, the first is {missing[0]}")
    return weights


def hugging_face_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` for `blk.3.attn_q.weight`."""
    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in top:
        return top[name]
    _, layer, part, kind = name.split(".")
    if part not in LAYER_NAMES:
        raise DemoModelError(f"tensor {name} is not part of a Llama model")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def _write_tokenizer(fields: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """A byte-level BPE tokenizer; `pre = smollm` splits digits one by one before the byte-level step."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pre = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") != "gpt2" or pre != "smollm":
        raise DemoModelError(f"tokenizer {fields.get('tokenizer.ggml.model')}/{pre}: expected gpt2/smollm")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(key: str) -> str | None:
        return None if config[key] is None else tokens[config[key]]

    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "bos_token": token("bos_token_id"),
            "eos_token": token("eos_token_id"),
            "pad_token": token("pad_token_id"),
            "unk_token": tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
