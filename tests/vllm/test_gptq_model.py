"""A real GPTQ checkpoint through vLLM: perplexity and text of the same weights as numbers, every linear fused.

The checkpoint is not part of the project. Its folder (`layers.safetensors`, `config.json`; see the guide on
quantisation) is named by TEST_DATA_GCU, or lies in `../shared/data` beside the repository.
"""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from engine import run
from safetensors.torch import load_file, save_file

from gcu_compile.kernels.dequant_gemm import eager

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TEST_DATA_GCU", ROOT.parent / "shared" / "data"))
CHECKPOINT = DATA / "checkpoints" / "smollm2-135m-gptq-int4-g64"
TEXT = DATA / "eval" / "wikitext2_test_docs.jsonl"
WINDOWS, LENGTH, LAYERS = 4, 512, 30
PROMPTS = ("The capital of France is", "Water boils at", "Three primary colours are")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKPOINT.exists() or not TEXT.exists(), reason=f"no checkpoint at {CHECKPOINT}"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The checkpoint, completed with the demo model's embedding and tokenizer."""
    from gcu_compile.demo_model import ensure_demo_model

    demo, folder = ensure_demo_model(None), tmp_path_factory.mktemp("gptq")
    tensors = load_file(CHECKPOINT / "layers.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = load_file(demo / "model.safetensors")[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in demo.glob("*.json"):
        shutil.copy(file, folder)
    shutil.copy(CHECKPOINT / "config.json", folder)
    return folder


def numbers(folder):
    """The checkpoint's weights as float32 in transformers' model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors, plain = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "qweight":
            scales = tensors[f"{base}.scales"].float()
            plain[f"{base}.weight"] = eager.dequantise(tensor, scales, None, None, "gptq_int4", tensor.shape[0] * 8)
        elif kind not in ("qzeros", "scales", "g_idx"):
            plain[name] = tensor.float()
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert model.load_state_dict(plain, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def reference(model):
    """Windows of text and prompts; what the weights as numbers say of them: losses of the tokens, and greedy text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    pages = [json.loads(line)["page"] for line in TEXT.read_text().splitlines()[:4]]
    ids = tokenizer("\n\n".join(pages))["input_ids"]
    windows = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(WINDOWS)]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    network, losses, text = numbers(model), [], []
    with torch.no_grad():
        for window in windows:
            x = torch.tensor([window])
            logits = network(x).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="none").tolist()
        for prompt in prompts:
            x = torch.tensor([prompt])
            y = network.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=24, do_sample=False)
            text.append(y[0, len(prompt) :].tolist())
    return windows, prompts, losses, text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perplexity_text_and_fusions(dtype, model, reference, tmp_path):
    windows, prompts, losses, text = reference
    request = {
        "llm": {"model": str(model), "max_model_len": 1024, "max_num_seqs": 8, "dtype": dtype},
        "prompts": windows + prompts,
        "sampling": [{"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0} for _ in windows]
        + [{"temperature": 0, "max_tokens": 24} for _ in prompts],
        "probe": True,
    }
    reply = run(tmp_path, request, timeout=800)
    assert "error" not in reply, reply["error"]
    found = [-value for one in reply["prompt_logprobs"][:WINDOWS] for value in one]
    assert len(found) == len(losses)
    ours, theirs = (math.exp(sum(each) / len(each)) for each in (found, losses))
    print(f"perplexity: {ours:.4f} in {dtype}, {theirs:.4f} of the weights as numbers")
    assert abs(ours / theirs - 1) < 0.005
    matches = [m for r in reply["workers"][0]["reports"] for m in r["matches"] if m["rule"] == "dequant_gemm"]
    assert [m["status"] for m in matches] == ["fused"] * (4 * LAYERS)
    if dtype == "float32":  # bfloat16 rounds the activations, and may choose another word
        for one, other in zip(reply["tokens"][WINDOWS:], text, strict=True):
            assert one == other[: len(one)] and len(one) >= 8


class Written(torch.nn.Module):
    """A GPTQ layer as a user would write it: shifts and masks, zero, scale, matmul."""

    def __init__(self, qweight, scales, groups):
        super().__init__()
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("groups", groups)

    def forward(self, x):
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = (self.qweight.unsqueeze(1) >> shifts.view(1, -1, 1)) & 15
        weight = (codes.flatten(0, 1) - 8) * self.scales[self.groups]
        return x @ weight


def test_every_linear_is_fused_in_plain_pytorch(model):
    import gcu_compile

    network, tensors = numbers(model), load_file(model / "model.safetensors")
    for name, module in list(network.named_modules()):
        if f"{name}.qweight" not in tensors:
            continue
        k = module.in_features
        scales = tensors[f"{name}.scales"].float()
        written = Written(tensors[f"{name}.qweight"], scales, torch.arange(k) // (k // scales.shape[0]))
        network.set_submodule(name, written)
    ids = torch.arange(100, 116).unsqueeze(0)
    with torch.no_grad():
        report = gcu_compile.explain(network, ids, use_cache=False, options={"inductor": False})
    assert report.fused["dequant_gemm"] == 7 * LAYERS  # q, k, v, o, gate, up, down
    assert report.error < 1e-3  # of logits, sums of 30 layers in float32
