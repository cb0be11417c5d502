"""Quantised checkpoints through vLLM: chosen by vLLM itself, fused by rule, equal to the same weights as numbers."""

import random
import statistics

import pytest
import torch
from engine import SMALL, run
from quantised import FORMS, greedy, load, logprobs, quantised_inputs, save
from several import run as run_several
from tiny import LLAMA, save_llama

from gcu_compile.kernels.tolerance import tolerance

pytestmark = pytest.mark.vllm
TOKENS, LINEARS = 16, 4  # qkv, o, gate_up, down
BY_DEFAULT = ("gptq int4 asymmetric act-order",)
COMPILED = (*BY_DEFAULT, "gptq int4", "gptq int8 v2 asymmetric act-order", "awq int4", "w4a16 asymmetric", "w8a16")


def prompts():
    source = random.Random(1)
    return [[source.randrange(2, LLAMA["vocab_size"]) for _ in range(length)] for length in (2, 5, 23, 40)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in BY_DEFAULT else [pytest.mark.slow]) for n in COMPILED]
)
def test_checkpoint_is_served_as_its_numbers(name, tmp_path):
    plain = save_llama(tmp_path / "plain")
    request = {
        "llm": {"model": str(save(FORMS[name], plain, tmp_path / "model")), **SMALL},
        "prompts": prompts(),
        "sampling": {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False},
        "probe": True,
    }
    reply = run(tmp_path / "run", request)
    assert "error" not in reply, reply["error"]
    assert reply["tokens"] == greedy(load(plain), prompts(), TOKENS)
    matches = [m for r in reply["workers"][0]["reports"] for m in r["matches"] if m["rule"] == "dequant_gemm"]
    fused = [m for m in matches if m["status"] == "fused"]
    assert len(fused) == LINEARS * LLAMA["num_hidden_layers"], matches


@pytest.mark.slow
def test_logits_of_every_format(tmp_path):
    """Uncompiled, in one process. Log-probabilities of the prompts' tokens: those of the stored numbers, multiplied by
    the activations that the format has."""
    requests, expected, unquantised = [], {}, {}
    for index, (name, form) in enumerate(FORMS.items()):
        plain = save_llama(tmp_path / f"plain{index}")
        unquantised[name] = logprobs(load(plain), prompts())
        folder = save(form, plain, tmp_path / f"model{index}")
        with quantised_inputs(form, unlike=(LLAMA["vocab_size"],)):
            expected[name] = logprobs(load(plain), prompts())
        sampling = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        requests.append(
            {
                "llm": {"model": str(folder), **SMALL, "enforce_eager": True},
                "prompts": prompts(),
                "sampling": sampling,
            }
        )
    for name, reply in zip(FORMS, run_several(tmp_path / "run", requests, timeout=900), strict=True):
        check_logprobs(FORMS[name], reply["logprobs"], expected[name], unquantised[name], name)
        op = "int8_gemm" if FORMS[name].activations else "dequant_gemm"
        assert reply["worker"]["calls"].get(f"{op}/host_cpp", 0) >= LINEARS * LLAMA["num_hidden_layers"], name
        assert not reply["worker"]["fallbacks"], name


def check_logprobs(form, found, expected, unquantised, name) -> None:
    """Weights alone: equal within float32. With int8 activations a difference in the last bit may move a code by one,
    and with it every token that follows: then half of the prompts within a tenth of what quantising the model changed,
    and none further off than half of it."""
    if form.activations:
        shares = []
        for each in zip(found, expected, unquantised, strict=True):
            ours, meant, before = map(torch.tensor, each)
            shares.append(((ours - meant).abs().mean() / (meant - before).abs().mean()).item())
        assert statistics.median(shares) < 0.1 and max(shares) < 0.5, (name, shares)
        return
    found, expected = (torch.tensor(sum(each, [])) for each in (found, expected))
    # Sums of all layers follow each other: two of K inputs in a block, and the head's.
    length = LLAMA["hidden_size"] * (2 * LLAMA["num_hidden_layers"] + 1)
    close = tolerance(torch.float32, length, scale=float(expected.abs().max()))
    torch.testing.assert_close(found, expected, **close, msg=lambda text: f"{name}: {text}")
