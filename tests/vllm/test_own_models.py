"""Models of ours that vLLM has no more: how they are registered, configured, refused, split and quantised.

What they say is in `test_families.py`.
"""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, THETA
from quantised import FORMS, load, logprobs, save
from random_models import CHUNKED, GREEDY, LIMITS, far, prompts
from safetensors.torch import load_file, save_file
from several import run
from test_quantization import check_logprobs

from gcu_compile.errors import UnsupportedFeatureError
from vllm_integration import models

pytestmark = pytest.mark.vllm
ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_importing_the_package_imports_neither_vllm_nor_transformers():
    code = "import sys, vllm_integration.models; print([m for m in ('vllm', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_class_of_vllm_is_left_alone(monkeypatch):
    from vllm.model_executor.models import ModelRegistry

    theirs = dict(ModelRegistry.models)
    for name in models.MODELS:
        theirs.pop(name, None)
    theirs["QWenLMHeadModel"] = theirs["LlamaForCausalLM"]
    monkeypatch.setattr(ModelRegistry, "models", theirs)
    models.register()
    models.register()
    assert theirs["QWenLMHeadModel"] is theirs["LlamaForCausalLM"]
    ours = {name: theirs[name].module_name for name in models.MODELS if name != "QWenLMHeadModel"}
    assert {place.rpartition(".")[0] for place in ours.values()} == {"vllm_integration.models"}
    assert theirs["DbrxForCausalLM"].module_name == "vllm_integration.models.dbrx"


@pytest.mark.parametrize("trusted", [False, True])
def test_no_code_of_a_repository_is_run_for_a_configuration(trusted, tmp_path):
    """config.json names a class whose module is not even there."""
    from vllm.transformers_utils.config import get_config

    models.register()
    FAMILIES["Qwen v1"].write(tmp_path)
    config = get_config(str(tmp_path), trust_remote_code=trusted)
    assert type(config).__module__ == "vllm_integration.models.configs"
    assert config.rope_parameters["rope_theta"] == THETA
    again = type(config).from_dict(config.to_dict())
    assert (again.intermediate_size, again.rope_parameters) == (config.intermediate_size, config.rope_parameters)


def test_rotary_base_of_internlm():
    from vllm_integration.models.configs import InternLMConfig

    assert InternLMConfig(rotary={"base": 5e5, "type": "origin"}).rope_parameters["rope_theta"] == 5e5
    assert InternLMConfig(rope_theta=3e4).rope_parameters["rope_theta"] == 3e4


def test_baichuan2_is_told_by_its_vocabulary():
    from vllm_integration.models.configs import BaichuanConfig

    assert BaichuanConfig(vocab_size=125696).norm_head and not BaichuanConfig(vocab_size=64000).norm_head


def test_what_qwen_is_not():
    from vllm_integration.models.configs import QWenConfig

    with pytest.raises(UnsupportedFeatureError, match="no_bias"):
        QWenConfig(no_bias=False)
    with pytest.raises(UnsupportedFeatureError, match="Qwen-VL"):
        QWenConfig(visual={"width": 1664})


def asked_for(config, length):
    return SimpleNamespace(model_config=SimpleNamespace(max_model_len=length, hf_config=config))


def test_lengths_at_which_flags_begin_to_act():
    from vllm_integration.models import configs, internlm, limits, qwen

    config = configs.QWenConfig(seq_length=2048, max_position_embeddings=8192, use_logn_attn=False)
    limits.refuse_beyond(asked_for(config, 2048), "seq_length", ["use_dynamic_ntk"])
    limits.refuse_beyond(asked_for(config, 8192), "seq_length", [])
    with pytest.raises(UnsupportedFeatureError, match="8192 is above seq_length 2048, where use_dynamic_ntk of"):
        qwen.QWenLMHeadModel(vllm_config=asked_for(config, 8192))
    config.use_logn_attn = True
    with pytest.raises(UnsupportedFeatureError, match="where use_dynamic_ntk and use_logn_attn of"):
        qwen.QWenLMHeadModel(vllm_config=asked_for(config, 2049))
    config = configs.InternLMConfig(rotary={"base": 10000, "type": "dynamic"}, max_position_embeddings=2048)
    with pytest.raises(UnsupportedFeatureError, match=r"above max_position_embeddings 2048, where rotary \(dynamic\)"):
        internlm.InternLMForCausalLM(vllm_config=asked_for(config, 2049))


@pytest.mark.parametrize("heads", [4, 6, 32, 40])
def test_slopes(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    from vllm_integration.models.baichuan import alibi_slopes

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # at distance 1
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs, rtol=1e-6, atol=0)


def test_a_quantised_head_of_baichuan2_is_refused():
    from vllm_integration.models.baichuan import BaichuanForCausalLM

    rows = BaichuanForCausalLM._with_unit_rows(None, [("lm_head.weight", torch.ones(2, 4))])
    assert torch.equal(dict(rows)["lm_head.weight"], torch.full((2, 4), 0.5))
    with pytest.raises(UnsupportedFeatureError, match=r"lm_head.qweight: a quantised head"):
        list(BaichuanForCausalLM._with_unit_rows(None, [("lm_head.qweight", torch.ones(2, 4))]))


def unpacked(tensors, theirs):
    """The first Qwen's tensors under the names of `theirs`, a Qwen2."""
    pairs = (
        ("transformer.wte", "model.embed_tokens"), ("transformer.h", "model.layers"),
        ("transformer.ln_f", "model.norm"), ("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"),
        ("attn.c_proj", "self_attn.o_proj"), (".attn.", ".self_attn."), ("mlp.c_proj", "mlp.down_proj"),
        ("w1", "up_proj"), ("w2", "gate_proj"),
    )  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        if "c_attn" in name:
            found |= {name.replace("c_attn", f"{part}_proj"): x for part, x in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            found[name] = tensor
    assert found.keys() == theirs.keys()
    return {name: tensor.contiguous() for name, tensor in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gptq int4", "gptq int4 asymmetric act-order"])
def test_a_quantised_qwen(form, tmp_path):
    """q, k and v are one quantised tensor on disk; AutoGPTQ writes biases of zeros for the rest."""
    import transformers

    reference, plain, folder = tmp_path / "reference", tmp_path / "plain", tmp_path / "model"
    family = FAMILIES["Qwen v1"]
    replace(family, config=None, pack=dict).write(reference)
    family.write(plain)
    save(FORMS[form], plain, folder)
    weights = unpacked(load_file(plain / "model.safetensors"), load_file(reference / "model.safetensors"))
    save_file(weights, reference / "model.safetensors", metadata={"format": "pt"})
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("scales")]:
        stored.setdefault(name.replace("scales", "bias"), torch.zeros(stored[name].shape[1]))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    request = {"llm": {**CHUNKED, "model": str(folder)}, "prompts": prompts(), "sampling": GREEDY}
    (reply,) = run(tmp_path / "run", [request], **ENGINE)
    assert isinstance(load(reference), transformers.Qwen2ForCausalLM)
    check_logprobs(FORMS[form], reply["logprobs"], logprobs(load(reference), prompts()), [], form)
    assert reply["worker"]["calls"]["dequant_gemm/host_cpp"] > 0 and not reply["worker"]["fallbacks"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen v1", "Baichuan2 13B"])
def test_two_workers(name, tmp_path):
    """A tensor of q, k and v is cut by heads, ALiBi's slopes with them, feed-forward layers in the middle."""
    expected = FAMILIES[name].write(tmp_path / "model")
    llm = {**CHUNKED, "model": str(tmp_path / "model"), "tensor_parallel_size": 2, "enforce_eager": True}
    del llm["distributed_executor_backend"]
    # One NUMA node cannot bind the threads of two workers: none is bound.
    request = {"llm": llm, "prompts": prompts(), "sampling": GREEDY}
    (reply,) = run(tmp_path / "run", [request], VLLM_CPU_OMP_THREADS_BIND="nobind")
    assert far(reply["logprobs"], expected["logprobs"]) < LIMITS["auto"]
    assert reply["tokens"] == expected["tokens"]
