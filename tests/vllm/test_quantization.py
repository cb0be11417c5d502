"""Quantised checkpoints through vLLM: chosen by vLLM itself, fused by rule, equal to the same weights as numbers."""

import random

import pytest
from engine import SMALL, run
from quantised import greedy, save_awq, save_gptq
from tiny import LLAMA

pytestmark = pytest.mark.vllm
TOKENS, LINEARS = 16, 4  # qkv, o, gate_up, down
FORMATS = {
    "gptq int4 asymmetric act-order": lambda folder: save_gptq(folder, 4, symmetric=False, desc_act=True),
    "awq": save_awq,
    "gptq int4 symmetric": save_gptq,
    "gptq int8 v2": lambda folder: save_gptq(folder, 8, symmetric=False, v2=True),
}
BY_DEFAULT = ("gptq int4 asymmetric act-order",)


def prompts():
    source = random.Random(1)
    return [[source.randrange(2, LLAMA["vocab_size"]) for _ in range(length)] for length in (1, 5, 23, 40)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in BY_DEFAULT else [pytest.mark.slow]) for n in FORMATS]
)
def test_checkpoint_is_served_as_its_numbers(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    FORMATS[name](folder)
    request = {
        "llm": {"model": str(folder), **SMALL},
        "prompts": prompts(),
        "sampling": {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False},
        "probe": True,
    }
    reply = run(tmp_path / "run", request)
    assert "error" not in reply, reply["error"]
    assert reply["tokens"] == greedy(folder / "plain", prompts(), TOKENS)
    matches = [m for r in reply["workers"][0]["reports"] for m in r["matches"] if m["rule"] == "dequant_gemm"]
    fused = [m for m in matches if m["status"] == "fused"]
    assert len(fused) == LINEARS * LLAMA["num_hidden_layers"], matches
