"""Quantised mixtures of experts through vLLM on our grouped products: logits of the stored numbers."""

import random

import pytest
import torch
from engine import SMALL
from quantised import FORMS, load, logprobs, quantised_inputs, save
from several import run
from test_quantization import check_logprobs
from tiny import LLAMA

pytestmark = pytest.mark.vllm
EXPERTS, TOP = 4, 2
LATENT = (512, 512)  # weight of keys and values from latents: vLLM multiplies queries and outputs by it, not int8 codes
CHOSEN = ("gptq int4 asymmetric act-order", "gptq int8", "awq int4", "w4a16 asymmetric", "w8a16", "w8a8")


def prompts():
    source = random.Random(2)
    return [[source.randrange(2, LLAMA["vocab_size"]) for _ in range(length)] for length in (2, 5, 23, 40)]


def save_mixture(family: str, folder):
    import transformers

    common = {**LLAMA, "num_experts_per_tok": TOP, "tie_word_embeddings": False}
    if family == "mixtral":
        config = transformers.MixtralConfig(**common, num_local_experts=EXPERTS)
        make = transformers.MixtralForCausalLM
    elif family == "qwen2_moe":
        sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
        config = transformers.Qwen2MoeConfig(**common, num_experts=EXPERTS, **sizes)
        make = transformers.Qwen2MoeForCausalLM
    elif family == "qwen3_moe":  # whose router vLLM makes with the configuration of the quantised layers
        config = transformers.Qwen3MoeConfig(**common, num_experts=EXPERTS, moe_intermediate_size=64, head_dim=64)
        make = transformers.Qwen3MoeForCausalLM
    else:
        sizes = {"moe_intermediate_size": 64, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
        heads = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}
        routing = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
        common |= {"num_key_value_heads": 4}
        config = transformers.DeepseekV2Config(**common, **sizes, **heads, v_head_dim=64, **routing)
        make = transformers.DeepseekV2ForCausalLM
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2"])
def test_logits_of_a_mixture(family, tmp_path):
    check(family, CHOSEN, tmp_path, enforce_eager=True)


def test_a_compiled_mixture(tmp_path):
    check("mixtral", ("w4a16 asymmetric", "w8a8"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"enforce_eager": True}, {}], ids=["uncompiled", "compiled"])
def test_int8_activations_of_every_kind(how, tmp_path):
    check("mixtral", ("w8a8 asymmetric", "w8a8 static asymmetric", "w8a8 static per tensor"), tmp_path, **how)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_other_compiled_mixtures(family, tmp_path):
    check(family, ("gptq int4 asymmetric act-order", "w8a8"), tmp_path)


def check(family, names, tmp_path, **how):
    """Log-probabilities of the prompts, by checkpoints of these formats, in engines that are started `how`."""
    requests, expected, unquantised = [], {}, {}
    chosen = {name: FORMS[name] for name in names}
    for index, (name, form) in enumerate(chosen.items()):
        plain = save_mixture(family, tmp_path / f"plain{index}")
        unquantised[name] = logprobs(load(plain), prompts())
        folder = save(form, plain, tmp_path / f"model{index}")
        with quantised_inputs(form, unlike=(LLAMA["vocab_size"], EXPERTS, 1, LATENT)):
            expected[name] = logprobs(load(plain), prompts())
        sampling = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        llm = {"model": str(folder), **SMALL, **how}
        requests.append({"llm": llm, "prompts": prompts(), "sampling": sampling})
    for name, reply in zip(chosen, run(tmp_path / "run", requests, timeout=900), strict=True):
        check_logprobs(chosen[name], reply["logprobs"], expected[name], unquantised[name], f"{family} {name}")
        op = "int8_gemm_grouped" if chosen[name].activations else "dequant_gemm_grouped"
        assert reply["worker"]["calls"].get(f"{op}/host_cpp", 0) >= 2, (name, reply["worker"])
        assert not reply["worker"]["fallbacks"], name
