"""`gcu-compile quantize --method gptq`: what it takes from llmcompressor, what it reports, and how it fails."""

import json
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import LLAMA, save_llama, save_tokenizer
from typer.testing import CliRunner

from gcu_compile.cli.main import app
from gcu_compile.errors import CheckpointError, GcuCompileError, InvalidValueError, UnknownNameError
from gcu_compile.quantize import FORMATS, gptq, quantize

TEXTS = ["The quick brown fox jumps over the lazy dog", "", "sphinx of black quartz, judge my vow " * 8]

# Stands in for llmcompressor where it is not installed: rounds to nearest, and leaves what llmcompressor would.
STAND_IN = """
import json, pathlib, sys
from gcu_compile.quantize import quantize
job = json.loads(pathlib.Path(sys.argv[-1]).read_text())
assert job["texts"] == {texts} and job["ignore"] == ["lm_head"], job
name = "w8a8" if job["activations"] else f"w{{job['weights']['num_bits']}}a16"
quantize(pathlib.Path(job["model"]), pathlib.Path(job["out"]), name, job["weights"].get("group_size"),
         lambda layer, done, total: print("quantised", layer.removesuffix(".weight")))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(save_llama(tmp_path_factory.mktemp("model")))


def python(folder, text):
    """An interpreter that runs `text`, whatever script it is given."""
    (folder / "stand_in.py").write_text(text)
    file = folder / "python"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "stand_in.py"} "$@"\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


@pytest.fixture
def stand_in(tmp_path):
    return python(tmp_path, STAND_IN.format(texts=[text for text in TEXTS if text]))


@pytest.mark.parametrize("form", FORMATS)
def test_codes_and_scales_are_taken_as_they_are(form, model, stand_in, tmp_path):
    seen = []
    report = quantize(
        model,
        tmp_path / "gptq",
        form,
        progress=lambda *words: seen.append(words),
        calibration=TEXTS,
        method="gptq",
        llmcompressor=stand_in,
    )
    quantize(model, tmp_path / "nearest", form)
    layers = 7 * LLAMA["num_hidden_layers"]
    assert report["method"] == "gptq" and len(report["layers"]) == layers
    assert [(done, total) for _, done, total in seen] == [(i + 1, layers) for i in range(layers)]
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("gptq", "nearest"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert (tmp_path / "gptq" / "config.json").read_text() == (tmp_path / "nearest" / "config.json").read_text()


def test_paths_may_be_relative(model, stand_in, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    words = ["quantize", "model", "--format", "w4a16", "--out", "out", "--method", "gptq"]
    (tmp_path / "text").write_text("\n".join(TEXTS))
    words += ["--calibration", "text", "--llmcompressor"]
    result = CliRunner().invoke(app, [*words, stand_in.name])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(GcuCompileError, match="there is no .*/missing to run llmcompressor with"):
        quantize(model, tmp_path / "other", "w4a16", calibration=TEXTS, method="gptq", llmcompressor=Path("missing"))


@pytest.mark.parametrize("form", FORMATS)
def test_outputs_are_measured_on_the_texts(form, model, tmp_path):
    """Against the definition: the float model's inputs of one layer, times both weights, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = quantize(model, tmp_path / "out", form, calibration=TEXTS)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer, inputs = AutoTokenizer.from_pretrained(model), []
    layer = network.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0][0].double()))
    for text in filter(None, TEXTS):
        network(torch.tensor([tokenizer(text)["input_ids"]]))
    from gcu_compile.quantize.stored import Stored

    name, weight = "model.layers.1.mlp.down_proj.weight", layer.weight.double()
    stored = Stored(tmp_path / "out", FORMATS[form].bits, report["group_size"]).numbers(name, weight.shape).double()
    x = torch.cat(inputs)
    expected = ((x @ (weight - stored).T).norm() / (x @ weight.T).norm()).item()
    (found,) = (layer for layer in report["layers"] if f"{layer['name']}.weight" == name)
    assert found["outputs"] == pytest.approx(expected, rel=1e-3) and found["outputs"] > 0
    assert all(layer["outputs"] > 0 for layer in report["layers"])


def test_command_says_the_method_and_both_errors(model, stand_in, tmp_path):
    (tmp_path / "text").write_text("\n".join(TEXTS))
    words = ["quantize", str(model), "--format", "w4a16", "--out", str(tmp_path / "out"), "--method", "gptq"]
    words += ["--calibration", str(tmp_path / "text"), "--llmcompressor", str(stand_in), "--kv-cache", "int8"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "w4a16, gptq, groups of 64, 14 layers, int8 KV cache with calibrated scales" in result.output
    assert "error of the weights" in result.output and "error of the outputs on the calibration" in result.output
    assert "model.layers.1.self_attn.k_scale" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; print('out of luck'); sys.exit(3)", r"llmcompressor failed \(3\).*\n.*out of luck"),
        ("print('done')", "left 14 layers as they were: model.layers.0.mlp.down_proj.weight; use"),
    ],
)
def test_a_failed_run_is_told_and_leaves_nothing(text, message, model, tmp_path):
    interpreter = python(tmp_path, text)
    before = set(tmp_path.iterdir())
    with pytest.raises((GcuCompileError, CheckpointError), match=message):
        quantize(model, tmp_path / "out", "w4a16", calibration=TEXTS, method="gptq", llmcompressor=interpreter)
    assert set(tmp_path.iterdir()) == before


def test_errors_name_the_method_and_the_text(model, tmp_path):
    with pytest.raises(UnknownNameError, match="unknown quantisation method 'gptk'. Did you mean 'gptq'"):
        quantize(model, tmp_path / "out", "w4a16", method="gptk")
    with pytest.raises(InvalidValueError, match="calibration cannot be None: expected texts"):
        quantize(model, tmp_path / "out", "w4a16", method="gptq")


def test_an_environment_that_cannot_be_made_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("no-such-package-as-this==1.0\n")
    monkeypatch.setattr(gptq, "LOCK", tmp_path / "lock")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(GcuCompileError, match=r"pip failed(.|\n)*name its Python \(--llmcompressor\)"):
        gptq.environment(tmp_path / "environment")
    assert not (tmp_path / "environment").exists()


def test_an_environment_is_made_once_and_again_after_a_cut(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("")
    monkeypatch.setattr(gptq, "LOCK", tmp_path / "lock")
    done = []
    monkeypatch.setattr(gptq, "_run", lambda what, *words: done.append(what))
    folder = tmp_path / "environment"
    folder.mkdir()
    (folder / "half").touch()
    with pytest.raises(FileNotFoundError):  # nothing made the folder in which it is noted: it does not count as made
        gptq.environment(folder)
    assert not (folder / "half").exists()
    folder.mkdir()
    monkeypatch.setattr(gptq, "_run", lambda what, *words: done.append(what) or folder.mkdir(exist_ok=True))
    assert gptq.environment(folder) == gptq.environment(folder) == folder / "bin" / "python"
    assert done == ["venv", "pip", "import"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_llmcompressor_itself(form, model, tmp_path):
    """Its own environment is made (about 2 GB, once); the outputs are nearer than those of rounding to nearest."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    generator = torch.Generator().manual_seed(0)
    texts = ["".join(map(chr, torch.randint(97, 123, (192,), generator=generator).tolist())) for _ in range(32)]
    nearest = quantize(model, tmp_path / "nearest", form, calibration=texts)
    solved = quantize(model, tmp_path / "gptq", form, calibration=texts, method="gptq")
    mean = {
        name: sum(layer["outputs"] for layer in report["layers"]) / len(report["layers"])
        for name, report in (("nearest", nearest), ("gptq", solved))
    }
    assert mean["gptq"] < mean["nearest"], mean
    settings = CompressedTensorsConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", dtype=torch.float32, quantization_config=settings)
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]
