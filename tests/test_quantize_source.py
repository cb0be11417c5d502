"""What `gcu-compile quantize` reads of a folder, what it copies, and the one line that it says when it refuses."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA, save_llama, save_tokenizer
from typer.testing import CliRunner

from gcu_compile.cli import main
from gcu_compile.cli import quantize as command
from gcu_compile.errors import CheckpointError, GcuCompileError, InvalidValueError
from gcu_compile.quantize import FORMATS, quantize
from gcu_compile.quantize.source import INDEX, WHOLE

LAYERS = 7 * LLAMA["num_hidden_layers"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(plain, tmp_path):
    """A copy that a test may spoil, in a folder of its own: what lies beside the output is then the test's."""
    return shutil.copytree(plain, tmp_path / "models" / "model")


def shard(model, *names, index=True):
    """The weights of `model` in files of these names, a layer after the other; their index beside them."""
    tensors = load_file(model / WHOLE)
    (model / WHOLE).unlink()
    where = {name: names[i * len(names) // len(tensors)] for i, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(part, model / file, metadata={"format": "pt"})
    if index:
        (model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return model


def edit(model, **changes):
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))
    return model


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_and_their_index_is_written(index, plain, model, tmp_path):
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    shard(model, *names, index=index)
    quantize(plain, tmp_path / "one", "w4a16")
    report = quantize(model, tmp_path / "out", "w4a16")
    assert len(report["layers"]) == LAYERS
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == names
    written = json.loads((tmp_path / "out" / INDEX).read_text())
    parts = {name: load_file(tmp_path / "out" / name) for name in names}
    assert written["weight_map"] == {tensor: name for name, part in parts.items() for tensor in part}
    tensors = {tensor: value for part in parts.values() for tensor, value in part.items()}
    assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    whole = load_file(tmp_path / "one" / WHOLE)
    assert tensors.keys() == whole.keys() and all(torch.equal(tensors[name], whole[name]) for name in whole)
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(dequantize=True)
    one, several = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, quantization_config=settings)
        for name in ("one", "out")
    )
    for name, tensor in one.state_dict().items():
        assert torch.equal(several.state_dict()[name], tensor), name


@pytest.mark.parametrize("names", [(), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")])
@pytest.mark.parametrize("index", [True, False])
def test_other_copies_of_the_weights_are_neither_read_nor_copied(index, names, model, tmp_path):
    """As Mistral publishes: the same weights once more under its own names, and those of other libraries."""
    own = {f"own.{name}": tensor for name, tensor in load_file(model / WHOLE).items()}
    if names:
        shard(model, *names, index=index)
    save_file(own, model / "consolidated.safetensors")
    copies = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model-q4.gguf"]
    copies += ["pytorch_model.bin.index.json", "consolidated.safetensors.index.json", "tf_model.h5"]
    for copy in copies:
        (model / copy).write_text("{}")
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    (model / "vocab.json").write_text("{}")
    report = quantize(model, tmp_path / "out", "w8a16")
    assert len(report["layers"]) == LAYERS
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "generation_config.json", "vocab.json"} | (
        {*names, INDEX} if names else {WHOLE}
    )
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert not any(name.startswith("own.") for name in load_file(file))


@pytest.mark.parametrize("name", [WHOLE, "model-00001-of-00001.safetensors"])
def test_one_file_has_the_name_that_readers_look_for_and_no_index(name, model, tmp_path):
    shard(model, name)
    quantize(model, tmp_path / "out", "w8a8")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == [WHOLE]


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_stay_whether_they_are_one_or_two(tied, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = save_llama(tmp_path / "model", tie_word_embeddings=tied)
    report = quantize(model, tmp_path / "out", "w4a16")
    before, after = load_file(model / WHOLE), load_file(tmp_path / "out" / WHOLE)
    heads = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert {weight["name"]: weight["meant"] for weight in report["left"]} == dict.fromkeys(heads, True)
    assert heads == {name for name in after if name.startswith(("lm_head", "model.embed"))}
    assert all(torch.equal(before[name], after[name]) for name in heads)
    settings = CompressedTensorsConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=settings)
    same = read.get_output_embeddings().weight is read.get_input_embeddings().weight
    assert same == tied and torch.equal(read.get_input_embeddings().weight, before["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gone"}, r"config.json names no model_type.*add it"),
        ({"model_type": "zebra"}, r"config.json: transformers .* knows no model_type 'zebra'\. Install a transformers"),
        ({"model_type": "zebra", "auto_map": {"AutoConfig": "z.Z"}}, r"a model's own code \(auto_map\) is not run"),
        ({"model_type": "t5"}, r"makes no causal language model of model_type 't5'.*take a model that generates"),
        ({"num_attention_heads": "many"}, r"makes no causal language model of model_type 'llama' with these settings"),
    ],
)
def test_a_config_that_says_too_little_or_too_much_is_refused(changes, message, model, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        quantize(edit(model, **changes), tmp_path / "out", "w8a8")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ],
)
def test_a_quantised_checkpoint_is_refused_by_name(config, method, model, tmp_path):
    with pytest.raises(CheckpointError, match=rf"is quantised already \({method}\); quantise the float model"):
        quantize(edit(model, **config), tmp_path / "out", "w8a8")


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed"])
def test_a_quantised_checkpoint_whose_config_is_silent_is_seen_by_its_tensors(suffix, model, tmp_path):
    tensors = load_file(model / WHOLE)
    tensors[f"model.layers.0.mlp.up_proj.{suffix}"] = torch.zeros(4, 4, dtype=torch.int32)
    save_file(tensors, model / WHOLE)
    with pytest.raises(CheckpointError, match=rf"quantised already \(it holds model.layers.0.mlp.up_proj.{suffix}\)"):
        quantize(model, tmp_path / "out", "w8a8")


def test_null_is_no_quantisation(model, tmp_path):
    edit(model, quantization_config=None)
    assert len(quantize(model, tmp_path / "out", "w8a8")["layers"]) == LAYERS


def no_weights(model):
    (model / WHOLE).rename(model / "pytorch_model.bin")


def consolidated_alone(model):
    (model / WHOLE).rename(model / "consolidated.safetensors")


def a_shard_short(model):
    shard(model, "a.safetensors", "b.safetensors")
    (model / "b.safetensors").unlink()


def index_elsewhere(model):
    (model / INDEX).write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def index_of_noise(model):
    (model / INDEX).write_text("[1]")


def two_copies(model):
    shutil.copy(model / WHOLE, model / "a.safetensors")
    (model / WHOLE).rename(model / "b.safetensors")


def truncated(model):
    (model / WHOLE).write_bytes((model / WHOLE).read_bytes()[:-100])


def no_config(model):
    (model / "config.json").unlink()


def broken_config(model):
    (model / "config.json").write_text("{")


def list_config(model):
    (model / "config.json").write_text("[]")


def no_folder(model):
    shutil.rmtree(model)


def nan_at_the_end(model):
    tensors = load_file(model / WHOLE)
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    save_file(tensors, model / WHOLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_weights, "model holds no model.safetensors and no shards of it, only pytorch_model.bin. Load the model"),
        (consolidated_alone, "no shards of it, only consolidated.safetensors. Load the model with transformers"),
        (a_shard_short, "model.safetensors.index.json names b.safetensors, which is not beside it (1 of 2 files are"),
        (index_elsewhere, "names ../model.safetensors, which is not beside it"),
        (index_of_noise, "model.safetensors.index.json is not an index of weights"),
        (two_copies, "a.safetensors and in"),
        (truncated, "model.safetensors cannot be read"),
        (no_config, "config.json: No such file or directory; take it from"),
        (broken_config, "config.json is not JSON"),
        (list_config, "config.json names no model_type"),
        (no_folder, "there is no folder"),
        (nan_at_the_end, "model.layers.1.self_attn.v_proj.weight: the weight holds NaN"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line_and_leaves_nothing(
    spoil, message, model, tmp_path, monkeypatch, capsys
):
    spoil(model)
    before = set(tmp_path.iterdir())
    words = ["gcu-compile", "quantize", str(model), "--format", "w4a16", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "error:" in said and message in said, said
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_named(plain, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"there is no folder .*/missing to write out in; make it first"):
        quantize(plain, tmp_path / "missing" / "out", "w8a8")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"there is no folder .*/file to write"):
        quantize(plain, tmp_path / "file" / "out", "w8a8")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="link exists already"):
        quantize(plain, tmp_path / "link", "w8a8")
    before = set(tmp_path.iterdir())

    def refuse(*words, **more):
        raise PermissionError(13, "Permission denied", "there")

    for function in ("tempfile.mkdtemp", "pathlib.Path.rename", "shutil.copy"):
        with monkeypatch.context() as patch:
            patch.setattr(function, refuse)
            with pytest.raises(CheckpointError, match=r"out was not written: .*Permission denied: 'there'; name a fol"):
                quantize(plain, tmp_path / "out", "w8a8")
        assert set(tmp_path.iterdir()) == before


def test_a_full_disk_is_said_and_leaves_nothing(plain, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*words, **more):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match="out was not written: .*No space left on device"):
        quantize(plain, tmp_path / "out", "w8a8")
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_file_that_cannot_be_read_is_named(model, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    words = ["quantize", str(model), "--format", "w8a8", "--kv-cache", "int8", "--out", str(tmp_path / "out")]
    for name, why in (("missing", "No such file"), ("models", "Is a directory"), ("latin", "it is not UTF-8")):
        result = CliRunner().invoke(main.app, [*words, "--calibration", str(tmp_path / name)])
        assert isinstance(result.exception, InvalidValueError)
        assert f"--calibration cannot be '{tmp_path / name}': expected a text file" in str(result.exception)
        assert why in str(result.exception)
    with pytest.raises(CheckpointError, match=r"reading texts needs its tokenizer, .*put the tokenizer's files beside"):
        quantize(model, tmp_path / "out", "w8a8", cache=True, calibration=["text"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["w4a16", "w8a16"])
@pytest.mark.parametrize("size", [0, -1, -64, 48, 256])
def test_a_group_size_that_fits_no_layer_is_refused_with_those_that_do(size, form, plain, tmp_path):
    said = (
        rf"group_size cannot be {size}: expected a divisor of every layer's inputs, which are 1, 2, 4, 8, 16, 32, 64; "
        rf"model.layers.0.\S+ has (128|192) inputs, no multiple of {size}"
    )
    with pytest.raises(InvalidValueError, match=said):
        quantize(plain, tmp_path / "out", form, size)
    words = ["quantize", str(plain), "--format", form, "--out", str(tmp_path / "out"), f"--group-size={size}"]
    result = CliRunner().invoke(main.app, words)
    assert isinstance(result.exception, InvalidValueError) and list(tmp_path.iterdir()) == []


def test_w8a16_takes_groups_and_w8a8_takes_none(plain, tmp_path):
    words = ["quantize", str(plain), "--format", "w8a16", "--group-size", "32", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main.app, words)
    assert result.exit_code == 0 and "w8a16, nearest, groups of 32, 14 layers" in result.output, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (8, "group", 32)
    whole = quantize(plain, tmp_path / "whole", "w8a16")
    grouped = load_file(tmp_path / "out" / WHOLE)["model.layers.0.mlp.down_proj.weight_scale"]
    assert grouped.shape == (128, 192 // 32) and whole["group_size"] is None
    for size in (0, 32):
        with pytest.raises(InvalidValueError, match=rf"cannot be {size}: expected none: w8a8 has a scale per output"):
            quantize(plain, tmp_path / "other", "w8a8", size)


def test_inputs_that_do_not_fill_a_word_name_layer_and_format(tmp_path):
    """4 heads of 3 give o_proj 12 inputs, which is not the smallest number: k_proj has 8."""
    odd = save_llama(tmp_path / "odd", hidden_size=8, intermediate_size=16, head_dim=3, num_hidden_layers=1)
    said = (
        "model.layers.0.self_attn.o_proj has 12 inputs, and w4a16 packs 8 codes in a word of 32 bits: 12 is no "
        "multiple of 8. Formats that fit every layer: w8a16, w8a8"
    )
    with pytest.raises(CheckpointError, match=said):
        quantize(odd, tmp_path / "out", "w4a16", 4)
    for form in ("w8a16", "w8a8"):
        assert len(quantize(odd, tmp_path / form, form)["layers"]) == 7


def test_w8a8_packs_nothing_so_any_number_of_inputs_will_do(tmp_path):
    odd = save_llama(tmp_path / "odd", hidden_size=24, intermediate_size=30, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"down_proj has 30 inputs, and w8a16 packs 4 .* every layer: w8a8$"):
        quantize(odd, tmp_path / "out", "w8a16")
    assert len(quantize(odd, tmp_path / "out", "w8a8")["layers"]) == 7


def test_no_default_group_fits(tmp_path):
    odd = save_llama(tmp_path / "odd", hidden_size=48, intermediate_size=96, num_hidden_layers=1)
    said = r"which are 1, 2, .*, 24, 48; \S+ has 48 inputs, no multiple of 32 \(the default: one of 128, 64, 32\)"
    with pytest.raises(InvalidValueError, match=said):
        quantize(odd, tmp_path / "out", "w4a16")
    assert quantize(odd, tmp_path / "out", "w4a16", 24)["group_size"] == 24


@pytest.mark.parametrize("form", FORMATS)
def test_the_bar_reaches_its_end(form, plain, tmp_path, monkeypatch):
    bars = []

    class Seen(command.Progress):
        def update(self, task, **changes):
            super().update(task, **changes)
            (shown,) = self.tasks
            bars.append((shown.description, shown.completed, shown.total))

    monkeypatch.setattr(command, "Progress", Seen)
    words = ["quantize", str(plain), "--format", form, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main.app, words)
    assert result.exit_code == 0, result.output
    assert [(done, total) for _, done, total in bars] == [(i + 1, LAYERS) for i in range(LAYERS)]
    assert all("_proj" in name for name, _, _ in bars)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GcuCompileError])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_failure_in_the_middle_leaves_no_folder(error, calibrated, model, tmp_path):
    save_tokenizer(model)
    before = set(tmp_path.iterdir())

    def stop(name, done, total):
        if done == LAYERS:
            assert len(set(tmp_path.iterdir()) - before) == 1  # there is something to remove
            raise error("enough")

    with pytest.raises(error, match="enough"):
        quantize(model, tmp_path / "out", "w4a16", None, stop, calibrated, ["text"] if calibrated else None)
    assert set(tmp_path.iterdir()) == before
