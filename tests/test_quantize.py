"""`gcu-compile quantize`: read back by transformers' compressed-tensors, whole or not at all, errors by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA, save_llama, save_tokenizer
from typer.testing import CliRunner

from gcu_compile.cli.main import app
from gcu_compile.errors import CheckpointError, InvalidValueError, UnknownNameError
from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.quantize import FORMATS, quantize


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"))


def numbers(folder, form, size):
    """The weights that a quantised folder stands for, from the definition of the format."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        base, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            n, k = load_file(folder / "model.safetensors")[f"{base}.weight_shape"].tolist()
            layout = layouts.get(f"int{FORMATS[form].bits}_rows_i32")
            codes, stored = layouts.unpack(tensor, layout, n, k).float(), load_file(folder / "model.safetensors")
            zeros = torch.tensor(layout.midpoint)
            if f"{base}.weight_zero_point" in stored:
                words = stored[f"{base}.weight_zero_point"]
                zeros = layouts.unpack(words.T.contiguous(), layout, words.shape[1], n).T.float()
                zeros = zeros.repeat_interleave(k // words.shape[1], 1)
            found[f"{base}.weight"] = codes - zeros
        elif kind == "weight":
            found[name] = tensor.float()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("weight_scale"):
            base = name.removesuffix("_scale")
            n, k = found[base].shape
            found[base] = (found[base].view(n, -1, size or k) * tensor.float().view(n, -1, 1)).view(n, k)
    return found


@pytest.mark.parametrize(
    ("form", "asymmetric"), [*((form, False) for form in FORMATS), ("w4a16", True), ("w8a16", True)]
)
def test_transformers_reads_what_was_written(form, asymmetric, model, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    report = quantize(model, tmp_path / "out", form, asymmetric=asymmetric)
    assert len(report["layers"]) == 7 * LLAMA["num_hidden_layers"]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    missing = plain.load_state_dict(numbers(tmp_path / "out", form, report["group_size"]), strict=False)
    assert not missing.unexpected_keys and not [key for key in missing.missing_keys if "proj" in key]
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    theirs = dict(read.named_parameters())
    for name, ours in plain.named_parameters():
        torch.testing.assert_close(theirs[name].float(), ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_rounded_to_the_nearest_code(form, model, tmp_path):
    report = quantize(model, tmp_path / "out", form)
    before, after = load_file(model / "model.safetensors"), numbers(tmp_path / "out", form, report["group_size"])
    for layer in report["layers"]:
        name = f"{layer['name']}.weight"
        n, k = before[name].shape
        groups = before[name].view(n, -1, report["group_size"] or k)
        step = groups.abs().amax(-1, keepdim=True) / (2 ** (FORMATS[form].bits - 1) - 0.5)
        error = (after[name].view_as(groups) - groups).abs()
        assert bool((error <= step * 0.5001).all())
        assert layer["relative"] == pytest.approx((error.norm() / groups.norm()).item(), rel=1e-3)


@pytest.mark.parametrize(("form", "size"), [("w4a16", 32), ("w8a16", None)])
def test_zero_points_bring_codes_nearer_to_weights_that_are_not_centred(form, size, tmp_path):
    folder = save_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "proj" in name:
            tensors[name] = tensors[name] + 0.05 * tensors[name].abs().max()
    tensors["model.layers.0.mlp.up_proj.weight"][:3] = torch.tensor([[0.0], [0.5], [-0.5]])  # one value, or none
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain = quantize(folder, tmp_path / "plain", form, size)
    report = quantize(folder, tmp_path / "out", form, size, asymmetric=True)
    after = numbers(tmp_path / "out", form, size)
    for layer, other in zip(report["layers"], plain["layers"], strict=True):
        before = tensors[f"{layer['name']}.weight"]
        groups = before.view(before.shape[0], -1, size or before.shape[1])
        reach = groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)
        error = (after[f"{layer['name']}.weight"].view_as(groups) - groups).abs()
        assert bool((error <= reach / (2 ** FORMATS[form].bits - 1) * 1.0001).all())  # the zero is rounded, too
        assert layer["relative"] < other["relative"]


def test_zero_points_are_for_weights_alone_and_rounding(model, tmp_path):
    for words in ({"name": "w8a8"}, {"name": "w4a16", "method": "gptq", "calibration": ["text"]}):
        with pytest.raises(InvalidValueError, match="zero points are for w4a16 and w8a16, rounded to nearest"):
            quantize(model, tmp_path / "out", **words, asymmetric=True)
    words = ["quantize", str(model), "--format", "w4a16", "--asymmetric", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "groups of 64 with zero points" in result.output, result.output


def test_command_reports_layers_and_writes_json(model, tmp_path):
    words = ["quantize", str(model), "--format", "w4a16", "--group-size", "32", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    assert "w4a16, nearest, groups of 32, 14 layers" in result.output and "_proj" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bytes_after"] < report["bytes_before"] and len(report["layers"]) == 14


def test_the_largest_group_that_fits_is_taken(model, tmp_path):
    assert quantize(model, tmp_path / "out", "w4a16")["group_size"] == 64  # 128 does not divide 192


def test_a_failure_leaves_nothing(model, tmp_path):
    def stop(name, done, total):
        if done == 3:
            raise RuntimeError("power failure")

    with pytest.raises(RuntimeError):
        quantize(model, tmp_path / "out", "w8a16", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_errors_name_layer_and_value(model, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'w4a16'"):
        quantize(model, tmp_path / "out", "w4a15")
    with pytest.raises(InvalidValueError, match=r"group_size cannot be 48.*down_proj|group_size cannot be 48.*has 128"):
        quantize(model, tmp_path / "out", "w4a16", 48)
    with pytest.raises(InvalidValueError, match="w8a8 has a scale per output"):
        quantize(model, tmp_path / "out", "w8a8", 64)
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(model, tmp_path, "w8a8")
    quantize(model, tmp_path / "once", "w8a8")
    with pytest.raises(CheckpointError, match=r"quantised already \(compressed-tensors\)"):
        quantize(tmp_path / "once", tmp_path / "twice", "w8a8")


def test_a_weight_of_nan_is_named(model, tmp_path):
    folder = save_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight: the weight holds NaN"):
        quantize(folder, tmp_path / "out", "w4a16")


def test_int8_cache_is_asked_for_and_its_scales_are_calibrated(tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = save_tokenizer(save_llama(tmp_path / "model"))
    dynamic = quantize(model, tmp_path / "dynamic", "w8a8", cache=True)
    scheme = json.loads((tmp_path / "dynamic" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert dynamic["kv_cache"] == "dynamic" and (scheme["type"], scheme["num_bits"], scheme["dynamic"]) == ("int", 8, 1)

    text = "The quick brown fox jumps over the lazy dog"
    (tmp_path / "text").write_text(f"{text}\n{text[::-1]}\n")
    words = ["quantize", str(model), "--format", "w4a16", "--out", str(tmp_path / "static"), "--kv-cache", "int8"]
    result = CliRunner().invoke(app, [*words, "--calibration", str(tmp_path / "text")])
    assert result.exit_code == 0 and "int8 KV cache with calibrated scales" in result.output, result.output
    stored = load_file(tmp_path / "static" / "model.safetensors")

    network, reach = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), {}
    for line in (text, text[::-1]):
        from transformers import AutoTokenizer

        cache = network(AutoTokenizer.from_pretrained(model)(line, return_tensors="pt")["input_ids"]).past_key_values
        for index, layer in enumerate(cache.layers):
            for kind, states in (("k", layer.keys), ("v", layer.values)):
                reach[index, kind] = max(reach.get((index, kind), 0.0), states.abs().max().item())
    for (index, kind), largest in reach.items():
        scale = stored[f"model.layers.{index}.self_attn.{kind}_scale"]
        assert scale.shape == (1,) and scale.item() == pytest.approx(largest / 127, rel=1e-5)
    for folder in ("static", "dynamic"):  # other readers of the format take it
        settings = CompressedTensorsConfig(dequantize=True)
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32, quantization_config=settings)


def test_calibration_needs_text_and_a_cache_is_int8(model, tmp_path):
    for texts in ([], ["", ""]):
        with pytest.raises(InvalidValueError, match="calibration cannot be .*expected a text"):
            quantize(model, tmp_path / "out", "w8a8", cache=True, calibration=texts)
    words = ["quantize", str(model), "--format", "w8a8", "--out", str(tmp_path / "out"), "--kv-cache", "int4"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code and isinstance(result.exception, UnknownNameError)


def test_experts_are_quantised_and_routers_are_not(tmp_path):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    config = Qwen2MoeConfig(**{**LLAMA, **sizes, "shared_expert_intermediate_size": 128, "num_hidden_layers": 1})
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    report = quantize(tmp_path / "model", tmp_path / "out", "w4a16")
    names = {layer["name"].rpartition("layers.0.")[2] for layer in report["layers"]}
    assert {f"mlp.experts.{i}.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")} < names
    assert "mlp.shared_expert.down_proj" in names and not any(name.endswith("gate") for name in names)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"} < set(stored)
