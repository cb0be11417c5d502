"""A model through vLLM and our compiler answers as transformers does, cold and from the compile cache."""

import random

import pytest
import torch
from engine import SMALL, run
from tiny import LLAMA, save_llama

pytestmark = pytest.mark.vllm
TOKENS = 24


def prompts():
    source = random.Random(0)
    return [[source.randrange(2, LLAMA["vocab_size"]) for _ in range(source.choice((1, 3, 17, 40)))] for _ in range(16)]


def expected(folder):
    """Greedy continuation by transformers, eager, fp32, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    result = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(ids, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, use_cache=True)
        result.append(out[0, len(prompt) :].tolist())
    return result


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Replies of a cold and of a second start, and what transformers says."""
    model = save_llama(tmp_path_factory.mktemp("llama"), eos_token_id=None, pad_token_id=None)
    folder = tmp_path_factory.mktemp("run")
    request = {
        "llm": {"model": str(model), **SMALL},
        "prompts": prompts(),
        "sampling": {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False},
        "probe": True,
    }
    return run(folder, request), run(folder, request), expected(model)


def test_greedy_tokens_equal_transformers(starts):
    cold, _, reference = starts
    assert cold.get("tokens") == reference, cold["log"][-3000:]


def test_the_compiler_is_ours(starts):
    for reply in starts[:2]:
        (worker,) = reply["workers"]
        assert worker["platform"] == "GcuHostPlatform"
        assert worker["compile_backend"] == "vllm_integration.compiler.GcuCompiler"
        assert worker["compile_mode"] == 3


def test_second_start_compiles_nothing_and_says_the_same(starts):
    cold, warm, reference = starts
    assert warm.get("tokens") == reference, warm["log"][-3000:]
    compiling = "Compiling a graph for compile range"
    assert compiling in cold["log"] and compiling not in warm["log"]
    assert "load AOT compilation" in warm["log"]


def test_second_start_tells_what_the_first_told(starts):
    (cold,), (warm,) = (reply["workers"] for reply in starts[:2])
    assert cold["reports"] and all(report["steps"] for report in cold["reports"])
    assert warm["reports"] == cold["reports"]
