"""`gcu-compile quantize` of mixtures: experts become integers, or report, command and config say why not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA
from typer.testing import CliRunner

from gcu_compile.cli.main import app
from gcu_compile.quantize import FORMATS, quantize
from gcu_compile.quantize.source import WHOLE
from gcu_compile.quantize.stored import Stored

ONE = {**LLAMA, "num_hidden_layers": 1}
TWO = {"num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    **{**LLAMA, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16},
    **{"qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    **{"topk_group": 1, "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
# architecture -> its configuration, whose experts are numbered in the files
NUMBERED = {"Mixtral": {**ONE, **TWO}, "DeepseekV2": LATENT}
# architecture -> its configuration, and the names of a layer's experts, one tensor each
STACKED = {
    "GraniteMoe": ({**ONE, **TWO}, ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")),
    "GptOss": (
        {**ONE, **TWO, "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
}


LLAMA4 = {**ONE, **TWO, "head_dim": 32, "intermediate_size_mlp": 192, "interleave_moe_layer_step": 1}


def save(folder, architecture, settings):
    import transformers

    torch.manual_seed(0)
    config = f"{architecture}TextConfig" if architecture == "Llama4" else f"{architecture}Config"
    model = getattr(transformers, f"{architecture}ForCausalLM")(getattr(transformers, config)(**settings))
    with torch.no_grad():  # some architectures leave their experts as the memory was
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def read(folder):
    """The model, by transformers' compressed-tensors."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)


def unpacked(folder, names):
    """Weights of the files in `folder`, by compressed-tensors alone: transformers reads packed experts only."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor, tensors = BaseCompressor.get_value_from_registry(config["format"]), load_file(folder / WHOLE)
    parts = {name: {"weight": tensors[name], "weight_scale": tensors[f"{name}_scale"]} for name in names}
    return {name: compressor.decompress(part, scheme)["weight"] for name, part in parts.items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", NUMBERED)
def test_numbered_experts_are_quantised_and_read_back(architecture, form, tmp_path):
    from transformers import AutoModelForCausalLM

    model = save(tmp_path / "model", architecture, NUMBERED[architecture])
    report = quantize(model, tmp_path / "out", form, 32 if form == "w4a16" else None)
    before, after = load_file(model / WHOLE), load_file(tmp_path / "out" / WHOLE)
    quantised = {f"{layer['name']}.weight" for layer in report["layers"]}
    left = {weight["name"] for weight in report["left"]}
    assert {name for name, tensor in before.items() if tensor.dim() > 1} == quantised | left
    assert {name for name in before if ".experts." in name} < quantised
    assert left == {name for name in before if name.endswith((".gate.weight", "embed_tokens.weight"))}
    assert all(weight["meant"] for weight in report["left"])
    for name in left:
        assert torch.equal(after[name], before[name])
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "re:.*\\.gate$"]

    stored = Stored(tmp_path / "out", FORMATS[form].bits, report["group_size"])
    numbers = {name: stored.numbers(name, before[name].shape) for name in quantised}
    if FORMATS[form].activations:
        theirs, ours = unpacked(tmp_path / "out", quantised), numbers
    else:
        theirs = dict(read(tmp_path / "out").named_parameters())
        save_file(before | numbers, model / WHOLE, metadata={"format": "pt"})
        ours = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    assert theirs.keys() >= ours.keys()
    for name, number in ours.items():
        torch.testing.assert_close(theirs[name].float(), number, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", STACKED)
def test_experts_in_one_tensor_stay_float_and_it_is_said(architecture, tmp_path):
    settings, experts = STACKED[architecture]
    model = save(tmp_path / "model", architecture, settings)
    words = ["quantize", str(model), "--format", "w8a16", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    reasons = {weight["name"]: weight["reason"] for weight in report["left"] if not weight["meant"]}
    assert set(reasons) == {f"model.layers.0.{name}" for name in experts}
    assert set(reasons.values()) == {"one tensor of 3 dimensions, as of stacked experts; only 2 are quantised"}
    for name in experts:
        assert f"warning: model.layers.*.{name} stays float (1 in all)" in result.stderr
    before, after = load_file(model / WHOLE), load_file(tmp_path / "out" / WHOLE)
    for weight in report["left"]:
        assert torch.equal(after[weight["name"]], before[weight["name"]])
    assert not any(".router" in layer["name"] for layer in report["layers"])

    pytest.importorskip("compressed_tensors")
    from compressed_tensors.utils import match_name

    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    block = experts[0].partition(".")[0]
    for name in (*(name.removesuffix(".weight") for name in reasons), f"model.layers.0.{block}.experts.0.gate_proj"):
        assert any(match_name(name, ignored) for ignored in ignore), name
    for layer in report["layers"]:
        assert not any(match_name(layer["name"], ignored) for ignored in ignore), layer["name"]
    from transformers import AutoModelForCausalLM

    stored = Stored(tmp_path / "out", 8, None)
    for layer in report["layers"]:
        name = f"{layer['name']}.weight"
        before[name] = stored.numbers(name, before[name].shape)
    theirs = dict(read(tmp_path / "out").named_parameters())
    save_file(before, model / WHOLE, metadata={"format": "pt"})
    for name, number in AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters():
        torch.testing.assert_close(theirs[name].float(), number, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["w4a16", "w8a8"])
def test_llama4s_experts_are_numbered_as_its_readers_want_them(form, tmp_path):
    model = save(tmp_path / "model", "Llama4", LLAMA4)
    report = quantize(model, tmp_path / "out", form)
    before, theirs = load_file(model / WHOLE), dict(read(tmp_path / "out").named_parameters())
    stored = Stored(tmp_path / "out", FORMATS[form].bits, report["group_size"])
    assert all(weight["meant"] for weight in report["left"])
    block = "model.layers.0.feed_forward"
    assert torch.equal(theirs[f"{block}.router.weight"], before[f"{block}.router.weight"])
    for expert in range(TWO["num_local_experts"]):
        gate, up = before[f"{block}.experts.gate_up_proj"][expert].T.chunk(2)
        down = before[f"{block}.experts.down_proj"][expert].T
        for part, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            name = f"{block}.experts.{expert}.{part}.weight"
            number = stored.numbers(name, weight.shape)
            torch.testing.assert_close(theirs[name].float(), number, rtol=1e-6, atol=1e-6)
            (found,) = (layer for layer in report["layers"] if f"{layer['name']}.weight" == name)
            assert found["relative"] == pytest.approx(((number - weight).norm() / weight.norm()).item(), rel=1e-4)
            assert found["relative"] < 0.2


def test_a_weight_that_transformers_does_not_know_is_named(tmp_path):
    model = save(tmp_path / "model", "Llama", ONE)
    tensors = load_file(model / WHOLE)
    for layer in (0, 7):
        tensors[f"model.mtp.{layer}.eh_proj.weight"] = torch.ones(4, 8)
    save_file(tensors, model / WHOLE, metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["quantize", str(model), "--format", "w8a8", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    told = "warning: model.mtp.*.eh_proj.weight stays float (2 in all), and readers are told so: no linear layer of"
    assert told in result.stderr
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "model.mtp.0.eh_proj", "model.mtp.7.eh_proj"]
