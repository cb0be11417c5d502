"""Tiny random models, made on the spot: big enough for every kernel's shape rules, small enough to compile in CI."""

from __future__ import annotations

from pathlib import Path

import torch

LLAMA = {
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def save_llama(folder: Path, **changes) -> Path:
    """A random Llama in fp32 in `folder`, without a tokenizer; `changes` go into its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # the default spread of 0.02 makes near-ties of every logit
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes with a chat template, for `save_llama`'s model in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tokens[0], eos_token=tokens[1], pad_token=tokens[1]
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder
