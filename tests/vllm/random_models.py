"""Random models of each kind of attention, and what transformers' eager attention says with them."""

import random

import torch

VOCABULARY, TOKENS = 272, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = {**SIZES, "intermediate_size": 192, "num_key_value_heads": 2, "max_position_embeddings": 256}
LATENT = {
    **GQA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "q_lora_rank": None,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "v_head_dim": 20,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
}

# Engines that cut prompts into chunks of 24 tokens.
CHUNKED = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 24,
    "dtype": "float32",
    "block_size": 16,
    "distributed_executor_backend": "uni",  # one process: an engine starts in seconds
}
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False, "prompt_logprobs": 0}
# What log-probabilities may differ by from transformers': a fp32 cache is exact; int8 rounds.
LIMITS = {"auto": 1e-4, "int8": 0.25}


def far(ours, theirs):
    """The largest difference of two lists of lists of numbers."""
    assert [len(a) for a in ours] == [len(b) for b in theirs]
    return max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


def prompts():
    source = random.Random(0)
    shared = [source.randrange(VOCABULARY) for _ in range(32)]  # two blocks that prefix caching can reuse
    lengths = (1, 3, 17, 40, 57)
    return [[*(shared if n > 33 else []), *(source.randrange(VOCABULARY) for _ in range(n))] for n in lengths]


def save(folder, kind, settings):
    """A random model in fp32 with weights large enough that its logits are far apart."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def expected(folder, given=None):
    """Log-probabilities of the prompts' tokens and the greedy continuation, one prompt at a time.

    Args:
        given: prompts; None: `prompts()`.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for module in model.modules():
        if hasattr(module, "gelu_impl"):  # vLLM's Bloom computes GELU by erf, transformers' by a tanh formula
            module.gelu_impl = torch.nn.GELU()
    tokens, logprobs = [], []
    with torch.no_grad():
        for prompt in given or prompts():
            ids = torch.tensor([prompt])
            out = model.generate(ids, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
            tokens.append(out[0, len(prompt) :].tolist())
            scores = model(ids).logits[0, :-1].log_softmax(-1)
            logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return {"tokens": tokens, "logprobs": logprobs}


def declare_int8_cache(folder, strategy):
    """Let the Llama in `folder` be a compressed-tensors checkpoint whose only quantised part is its KV cache.

    Scales are calibrated on `prompts()`: one per layer (`tensor`), or per KV head (`attn_head`), as llm-compressor
    stores them.
    """
    import json

    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    weights, file = load_file(folder / "model.safetensors"), folder / "config.json"
    with torch.no_grad():
        caches = [model(torch.tensor([ids]), use_cache=True).past_key_values for ids in prompts()]
    for i in range(model.config.num_hidden_layers):
        for name, part in (("k", "keys"), ("v", "values")):
            largest = torch.stack([getattr(c.layers[i], part).abs().amax((0, 2, 3)) for c in caches]).amax(0) / 127
            stored = largest.max().view(1) if strategy == "tensor" else largest.view(-1, 1, 1)
            weights[f"model.layers.{i}.self_attn.{name}_scale"] = stored.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": True, "dynamic": False}
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
                                     "ignore": [], "kv_cache_scheme": scheme}  # fmt: skip
    file.write_text(json.dumps(config))
    return folder
