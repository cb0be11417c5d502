"""Quantised layers on two tensor-parallel workers of a CPU: the log-probabilities of one worker."""

import random
from dataclasses import replace

import pytest
import torch
from engine import SMALL
from quantised import FORMS, save
from several import run
from test_quantization import check_logprobs
from tiny import LLAMA, save_llama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
# 192 inputs of the down projection are 96 a rank, which groups of 32 divide.
CHOSEN = ("gptq int4 asymmetric act-order", "gptq int8", "awq int4", "w4a16 asymmetric", "w8a8 static", "w8a8")


def prompts():
    source = random.Random(4)
    return [[source.randrange(2, LLAMA["vocab_size"]) for _ in range(length)] for length in (2, 5, 23, 40)]


@pytest.mark.parametrize("name", CHOSEN)
def test_two_workers_say_what_one_says(name, tmp_path):
    sampling = {"temperature": 0, "max_tokens": 8, "prompt_logprobs": 0, "detokenize": False, "ignore_eos": True}
    chosen = replace(FORMS[name], group=32 if FORMS[name].group else FORMS[name].group)
    folder = save(chosen, save_llama(tmp_path / "plain"), tmp_path / "model")
    requests = [
        {
            "llm": {"model": str(folder), **SMALL, "enforce_eager": True, "tensor_parallel_size": workers},
            "prompts": prompts(),
            "sampling": sampling,
        }
        for workers in (1, 2)
    ]
    # One NUMA node cannot bind the threads of two workers: none is bound.
    one, two = run(tmp_path / "run", requests, timeout=900, VLLM_CPU_OMP_THREADS_BIND="nobind")
    if chosen.activations != "dynamic":
        check_logprobs(replace(chosen, activations=""), two["logprobs"], one["logprobs"], [], name)
        assert two["tokens"] == one["tokens"], name
    else:  # each worker has its own scale for its part of a token
        found, expected = (torch.tensor(sum(reply["logprobs"], [])) for reply in (two, one))
        assert (found - expected).abs().mean() < 0.05
