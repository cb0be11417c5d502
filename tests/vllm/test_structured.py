"""Structured outputs, beam search and `n` in one running engine, each request asking for something else."""

import json
import math
import re

import pytest
import torch
from engine import SMALL, run
from tiny import save_llama, save_tokenizer

from gcu_compile.kernels.tolerance import tolerance

pytestmark = [pytest.mark.vllm, pytest.mark.slow]  # two engines
LIMITS = tolerance(torch.float32, 272)  # the tiny model's vocabulary, its longest sum
CLOSE = {"rel": LIMITS["rtol"], "abs": LIMITS["atol"]}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
REGEX, CHOICES = r"[a-f]{3}-[0-9]{2}", ["north", "south-east", "west"]
PROMPTS = [[5, 6, 7], [9, 9, 9, 9, 30]]
COMMON = {"max_tokens": 40, "min_tokens": 1}
GREEDY = [
    {"temperature": 0, "structured_outputs": {"regex": REGEX}},
    {"temperature": 0, "structured_outputs": {"choice": CHOICES}},
    {"temperature": 0, "structured_outputs": {"json": SCHEMA}, "repetition_penalty": 1.3, "logprobs": 3},
    {"temperature": 0, "max_tokens": 12, "ignore_eos": True},  # no grammar, beside those with one
]
DRAWN = [
    {"temperature": 1.0, "seed": 3, "n": 3, "structured_outputs": {"regex": REGEX}},
    {"temperature": 1.5, "seed": 4, "top_p": 0.9, "min_p": 0.01, "structured_outputs": {"choice": CHOICES}},
    {"temperature": 1.0, "seed": 5, "top_k": 40, "n": 2, "structured_outputs": {"json": SCHEMA}},
    {"temperature": 1.0, "seed": 6, "max_tokens": 12, "ignore_eos": True},
]
EAGER = {"enforce_eager": True}
BEAMS = {"beam_width": 3, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tokenizer(save_llama(tmp_path_factory.mktemp("llama"))))


def ask(model, folder, asked, **environ):
    pairs = [(prompt, one) for one in asked for prompt in PROMPTS]
    plain = {"backend": "xgrammar", "disable_any_whitespace": True}  # or a random model writes nothing else
    request = {
        "llm": {"model": model, **SMALL, "skip_tokenizer_init": False, "structured_outputs_config": plain} | EAGER,
        "prompts": [prompt for prompt, _ in pairs],
        "sampling": [{**COMMON, **one} for _, one in pairs],
        "beams": BEAMS,
    }
    reply = run(folder, request, **environ)
    assert "tokens" in reply, reply["log"][-3000:]
    return reply


@pytest.fixture(scope="module")
def together(model, tmp_path_factory):
    """One mixed batch of them all."""
    return ask(model, tmp_path_factory.mktemp("together"), GREEDY + DRAWN)


def test_every_completion_is_of_its_grammar(together):
    texts = iter(together["texts"])
    for one in GREEDY + DRAWN:
        for _ in PROMPTS:
            completions = next(texts)
            assert len(completions) == one.get("n", 1)
            grammar = one.get("structured_outputs", {})
            for text in completions:
                if "regex" in grammar:
                    assert re.fullmatch(REGEX, text), text
                elif "choice" in grammar:
                    assert text in CHOICES
                elif "json" in grammar:
                    value = json.loads(text)
                    assert set(value) == {"ok", "size"} and isinstance(value["ok"], bool) and 0 <= value["size"] <= 99


def test_draws_vary_within_a_grammar(together):
    first = len(GREEDY) * len(PROMPTS)
    for completions in together["all_tokens"][first : first + len(PROMPTS)]:
        assert len({tuple(tokens) for tokens in completions}) == 3


def test_no_batch_fell_back(together):
    assert together["fallbacks"] == [{}]


def test_greedy_ones_and_beams_equal_stock_vllm(model, together, tmp_path):
    stock = ask(model, tmp_path, GREEDY, VLLM_PLUGINS="")
    count = len(stock["tokens"])
    assert together["tokens"][:count] == stock["tokens"]
    for mine, theirs in zip(together["logprobs"][:count], stock["logprobs"], strict=True):
        for step, same in zip(mine, theirs, strict=True):
            known = {token: score for token, (score, _) in same.items() if score > -math.inf}  # the rest is forbidden
            assert known and known.keys() == {token for token, (score, _) in step.items() if score > -math.inf}
            assert [step[token][0] for token in known] == pytest.approx(list(known.values()), **CLOSE)
    longest = len(PROMPTS[0]) + BEAMS["max_tokens"]
    for mine, theirs in zip(together["beams"], stock["beams"], strict=False):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in theirs] and len(mine) == BEAMS["beam_width"]
        assert [score for _, score in mine] == pytest.approx([score for _, score in theirs], **CLOSE)
    assert {len(tokens) for tokens, _ in together["beams"][0]} == {longest}
