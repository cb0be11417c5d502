"""The vendor's names as `quantization=`, and checkpoints of `gcu-compile quantize`, through vLLM."""

import json
import random

import pytest
import torch
from engine import SMALL
from quantised import FORMS as STORED
from quantised import LINEAR, load, logprobs, quantised_inputs, save
from quantised import Form as Stored
from safetensors.torch import load_file, save_file
from several import run
from test_quantization import check_logprobs
from tiny import LLAMA, save_llama, save_tokenizer

from gcu_compile.errors import CheckpointError
from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.quantize import quantize
from gcu_compile.quantize.rounding import FORMATS, to_nearest

pytestmark = pytest.mark.vllm
ACTIVATIONS = {"w4a16": "", "w8a16": "", "w8a8": "dynamic"}


def prompts():
    source = random.Random(3)
    return [[source.randrange(2, LLAMA["vocab_size"]) for _ in range(length)] for length in (2, 5, 23, 40)]


def round_weights(folder, name, size=None):
    """The checkpoint in `folder` with the numbers of its rounded weights."""
    tensors = load_file(folder / "model.safetensors")
    for key, weight in tensors.items():
        if LINEAR.search(key):
            n, k = weight.shape
            group = size or FORMATS[name].group_size(k)
            codes, scales = to_nearest(weight, FORMATS[name].bits, group)
            tensors[key] = (codes.view(n, -1, group or k) * scales.float().unsqueeze(-1)).view(n, k)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def expected(folder, name):
    form = Stored("compressed", activations=ACTIVATIONS[name])
    with quantised_inputs(form, unlike=(LLAMA["vocab_size"],)):
        return form, logprobs(load(folder), prompts())


def stored_numbers(folder):
    """transformers' model of a quantised checkpoint, its weights as numbers."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_names_and_checkpoints(name, tmp_path):
    """In one process: a float checkpoint rounded at load, the same with an int8 cache, the written checkpoint alone, by
    its name, and with calibrated scales of the cache."""
    plain, text = save_tokenizer(save_llama(tmp_path / "plain")), ["The quick brown fox", "jumps over the lazy dog"]
    written = tmp_path / "written"
    size = quantize(plain, written, name)["group_size"]
    quantize(plain, tmp_path / "cached", name, cache=True)
    if name != "w8a8":
        quantize(plain, tmp_path / "asymmetric", name, asymmetric=True)
    quantize(plain, tmp_path / "calibrated", name, cache=True, calibration=text)
    cases = {
        "rounded": {"model": plain, "quantization": name},
        "rounded c8": {"model": plain, "quantization": f"{name}c8"},
        "written": {"model": written},
        "written, named": {"model": written, "quantization": name},
        "cached": {"model": tmp_path / "cached"},
        "calibrated": {"model": tmp_path / "calibrated"},
    }
    if name != "w8a8":
        cases["asymmetric"] = {"model": tmp_path / "asymmetric"}
    sampling = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
    requests = [
        {"llm": {**SMALL, **case, "model": str(case["model"]), "enforce_eager": True}, "prompts": prompts()}
        for case in cases.values()
    ]
    replies = run(tmp_path / "run", [{**request, "sampling": sampling} for request in requests], timeout=900)
    replies = dict(zip(cases, replies, strict=True))
    unquantised = logprobs(load(plain), prompts())
    form, by_layer = expected(round_weights(save_llama(tmp_path / "by_layer"), name), name)
    _, as_written = expected(round_weights(save_llama(tmp_path / "as_written"), name, size), name)
    check_logprobs(form, replies["rounded"]["logprobs"], by_layer, unquantised, "rounded")
    for case in ("written", "written, named"):
        check_logprobs(form, replies[case]["logprobs"], as_written, unquantised, case)
    if name != "w8a8":
        stored = logprobs(stored_numbers(tmp_path / "asymmetric"), prompts())
        check_logprobs(form, replies["asymmetric"]["logprobs"], stored, unquantised, "asymmetric")
    assert {case for case in cases if replies[case]["kv_cache_dtype"].startswith("int8")} == {
        "rounded c8",
        "cached",
        "calibrated",
    }
    for case, numbers in (("rounded c8", by_layer), ("cached", as_written), ("calibrated", as_written)):
        found, numbers = torch.tensor(sum(replies[case]["logprobs"], [])), torch.tensor(sum(numbers, []))
        # Keys and values of 8 bits: a small change, and one that is seen.
        assert 0 < (found - numbers).abs().mean() < 0.05, case


@pytest.mark.slow
def test_an_int8_cache_beside_other_checkpoints(tmp_path):
    """`w4a16c8` and `w8a16c8` of GPTQ and AWQ, and a cache that is asked for by its own argument."""
    cases = {
        ("gptq int4 asymmetric act-order", "w4a16c8"): {"quantization": "w4a16c8"},
        ("gptq int8", "w8a16c8"): {"quantization": "w8a16c8"},
        ("awq int4", "w4a16c8"): {"quantization": "w4a16c8"},
        ("awq int4", None): {"kv_cache_dtype": "int8"},
    }
    requests, meant = [], []
    for index, ((name, _), words) in enumerate(cases.items()):
        plain = save_llama(tmp_path / f"plain{index}")
        folder = save(STORED[name], plain, tmp_path / f"model{index}")
        meant.append(torch.tensor(sum(logprobs(load(plain), prompts()), [])))
        sampling = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        llm = {**SMALL, **words, "model": str(folder), "enforce_eager": True}
        requests.append({"llm": llm, "prompts": prompts(), "sampling": sampling})
    for reply, numbers in zip(run(tmp_path / "run", requests, timeout=900), meant, strict=True):
        assert reply["kv_cache_dtype"].startswith("int8") and not reply["worker"]["fallbacks"]
        difference = (torch.tensor(sum(reply["logprobs"], [])) - numbers).abs().mean()
        assert 0 < difference < 0.05  # keys and values of 8 bits: a small change, and one that is seen


@pytest.mark.slow
def test_mixtures_whose_models_load_experts_in_their_own_ways(tmp_path):
    """All experts in one tensor (DBRX, Llama 4), or layers without names (DeepSeek-MoE): none is missed."""
    from families import FAMILIES
    from random_models import CHUNKED, GREEDY
    from random_models import prompts as asked
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    meant = [FAMILIES[name].write(tmp_path / name)["logprobs"] for name in ("DBRX", "DeepSeek-MoE")]
    torch.manual_seed(0)
    sizes = {**LLAMA, "tie_word_embeddings": False, "head_dim": 64}
    sizes |= {"intermediate_size_mlp": 192, "interleave_moe_layer_step": 1}
    config = Llama4TextConfig(**sizes, num_local_experts=4, num_experts_per_tok=1)
    network = Llama4ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    network.save_pretrained(tmp_path / "Llama 4")
    meant.append(logprobs(network, asked()))
    requests = []
    for name in ("DBRX", "DeepSeek-MoE", "Llama 4"):
        remote = name in FAMILIES and FAMILIES[name].remote
        llm = {**CHUNKED, "model": str(tmp_path / name), "quantization": "w8a16", "trust_remote_code": remote}
        requests.append({"llm": {**llm, "enforce_eager": True}, "prompts": asked(), "sampling": GREEDY})
    environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for reply, numbers in zip(run(tmp_path / "run", requests, timeout=900, **environ), meant, strict=True):
        difference = (torch.tensor(sum(reply["logprobs"], [])) - torch.tensor(sum(numbers, []))).abs().mean()
        assert 0 < difference < 0.05  # weights of 8 bits
        assert reply["worker"]["calls"]["dequant_gemm_grouped/host_cpp"] > 0 and not reply["worker"]["fallbacks"]


def test_a_name_that_is_not_the_checkpoints(tmp_path):
    import vllm_integration

    vllm_integration.register()
    from vllm.model_executor.layers.quantization import get_quantization_config

    written = tmp_path / "written"
    quantize(save_llama(tmp_path / "plain"), written, "w4a16")
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    for name in ("w4a16", "w4a16c8"):
        assert get_quantization_config(name).override_quantization_method(config, name) == name
        assert get_quantization_config(name).override_quantization_method(config, None) is None
    for name in ("w8a16", "w8a8", "w8a8c8"):
        with pytest.raises(CheckpointError, match=rf"quantization='{name}', and the checkpoint is w4a16"):
            get_quantization_config(name).override_quantization_method(config, name)
    gptq = {"quant_method": "gptq", "bits": 8}
    assert get_quantization_config("w8a16").override_quantization_method(gptq, "w8a16") == "w8a16"
    with pytest.raises(CheckpointError, match="the checkpoint is fp8"):
        get_quantization_config("w8a8").override_quantization_method({"quant_method": "fp8"}, "w8a8")


@pytest.mark.parametrize("name", FORMATS)
def test_routers_stay_as_they_are(name):
    """Qwen3-MoE's is a linear layer that vLLM gives the configuration to."""
    import layers
    from vllm.model_executor.layers.quantization import get_quantization_config

    import vllm_integration

    vllm_integration.register()
    weight, x = torch.randn(64, 256), torch.randn(5, 256)
    for prefix in ("model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate", "model.layers.0.mlp.gate_proj"):
        with layers.shard():
            layer = layers.make("column", get_quantization_config(name)(), prefix, 256, 64)
            layers.fill(layer, {"weight": weight}, "")
            found = layers.apply(layers.ready(layer), x)
        exact = torch.allclose(found, x @ weight.T, rtol=1e-4, atol=1e-4)
        assert exact is prefix.endswith("gate"), prefix


def test_a_float_tensor_that_does_not_fit_or_is_not_there():
    import layers
    from vllm.model_executor.layers.quantization import get_quantization_config

    import vllm_integration

    vllm_integration.register()
    with layers.shard():
        layer = layers.make("column", get_quantization_config("w4a16")(), "model.layers.0.mlp.up_proj", 256, 192)
        message = r"up_proj \(float, rounded at load\): a tensor of \[96, 256\] does not fit"
        with pytest.raises(CheckpointError, match=message):
            layers.fill(layer, {"weight": torch.zeros(96, 256)}, "")
        with pytest.raises(CheckpointError, match=r"up_proj \(float, rounded at load\): the checkpoint lacks weight"):
            layers.ready(layer)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("of", [1, 2])
def test_a_float_layer_is_rounded_at_load(name, of):
    """Whole, and its outputs cut for two ranks."""
    import layers
    from vllm.model_executor.layers.quantization import get_quantization_config

    import vllm_integration

    vllm_integration.register()
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(0)) / 16
    x, form = torch.randn(5, 256), Stored("compressed", activations=ACTIVATIONS[name])
    codes, scales = to_nearest(weight, FORMATS[name].bits, FORMATS[name].group_size(256))
    numbers = (codes.view(*scales.shape, -1) * scales.unsqueeze(-1)).view(192, 256)
    found = []
    for rank in range(of):
        with layers.shard(rank, of):
            layer = layers.make("column", get_quantization_config(name)(), "model.layers.0.mlp.up_proj", 256, 192)
            layers.fill(layer, {"up_proj.weight": weight}, "up_proj")
            found.append(layers.apply(layers.ready(layer), x))
        assert not hasattr(layer, "weight")
    expected = form.inputs(x, (0.0, 0.0)).double() @ numbers.double().T
    torch.testing.assert_close(torch.cat(found, -1).double(), expected, **tolerance(torch.float32, 256))
