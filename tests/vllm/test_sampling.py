"""Our sampler in a running engine: greedy features equal stock vLLM's, seeds hold alone and in any batch."""

import pytest
import torch
from engine import SMALL, run
from tiny import save_llama

from gcu_compile.kernels.tolerance import tolerance

pytestmark = pytest.mark.vllm
LIMITS = tolerance(torch.float32, 272)  # the tiny model's vocabulary, its longest sum
CLOSE = {"rel": LIMITS["rtol"], "abs": LIMITS["atol"]}
COMMON = {"max_tokens": 12, "ignore_eos": True, "detokenize": False}
PROMPTS = [[5, 6, 7], [9, 9, 9, 9, 30], [11], [40, 41, 42, 43]]
# Deterministic, one feature each and all together.
GREEDY = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.7},
    {"temperature": 0, "frequency_penalty": 1.1, "presence_penalty": 0.7},
    {"temperature": 0, "logit_bias": {"13": 3.5, "20": -100.0}},
    {"temperature": 0, "allowed_token_ids": [3, 5, 8, 13, 21, 34, 55]},
    {"temperature": 0, "min_tokens": 6, "stop_token_ids": [13, 141, 104]},
    {
        "temperature": 0,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "logit_bias": {"30": 2.0},
        "allowed_token_ids": list(range(2, 60)),
    },
    {"temperature": 0, "logprobs": 4, "prompt_logprobs": 2, "presence_penalty": 0.5},
]
SEEDED = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.8, "seed": 2},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "seed": 3},
    {"temperature": 1.0, "top_k": 5, "presence_penalty": 0.5, "seed": 4},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("llama")))


def ask(model, folder, pairs, llm=None, **environ):
    request = {
        "llm": {"model": model, **SMALL, "enforce_eager": True, **(llm or {})},
        "prompts": [prompt for prompt, _ in pairs],
        "sampling": [{**COMMON, **setting} for _, setting in pairs],
    }
    reply = run(folder, request, **environ)
    assert "tokens" in reply, reply["log"][-3000:]
    return reply


@pytest.fixture(scope="module")
def together(model, tmp_path_factory):
    """One mixed batch: every request asks for something else; some rows occur twice."""
    greedy = [(prompt, setting) for setting in GREEDY for prompt in PROMPTS]
    seeded = [(PROMPTS[0], setting) for setting in SEEDED]
    several = [(PROMPTS[1], {"temperature": 1.0, "seed": 9, "n": 3})]
    return ask(model, tmp_path_factory.mktemp("together"), greedy + seeded + several)


def test_greedy_features_equal_stock_vllm(model, together, tmp_path):
    pairs = [(prompt, setting) for setting in GREEDY for prompt in PROMPTS]
    stock = ask(model, tmp_path, pairs, VLLM_PLUGINS="")
    assert together["tokens"][: len(pairs)] == stock["tokens"]
    assert any(stock["logprobs"]) and any(stock["prompt_logprobs"])
    assert_same_scores(together["logprobs"][: len(pairs)], stock["logprobs"])
    for mine, theirs in zip(together["prompt_logprobs"], stock["prompt_logprobs"], strict=False):
        assert mine == pytest.approx(theirs, **CLOSE)


def assert_same_scores(ours, theirs):
    """The same tokens shown beside each token written, with the same ranks and log-probabilities."""
    for mine, expected in zip(ours, theirs, strict=True):
        for step, same in zip(mine, expected, strict=True):
            assert set(step) == set(same) and all(step[token][1] == same[token][1] for token in step)
            assert [step[t][0] for t in step] == pytest.approx([same[t][0] for t in step], **CLOSE)


def test_no_batch_fell_back(together):
    assert together["fallbacks"] == [{}]


def test_seed_gives_the_same_tokens_alone_and_in_another_order(model, together, tmp_path):
    alone = ask(model, tmp_path, [(PROMPTS[0], setting) for setting in reversed(SEEDED)])
    start = len(GREEDY) * len(PROMPTS)
    assert alone["tokens"][::-1] == together["tokens"][start : start + len(SEEDED)]


def test_n_gives_different_completions(together):
    completions = together["all_tokens"][-1]
    assert len(completions) == 3 and len({tuple(tokens) for tokens in completions}) == 3


def test_float32_option_restores_upstream_and_says_so(model, tmp_path):
    pairs = [(PROMPTS[0], GREEDY[1])]
    reply = ask(model, tmp_path, pairs, GCU_COMPILE_POST_PROCESSING_DTYPE="float32")
    (fallbacks,) = reply["fallbacks"]
    assert set(fallbacks) == {"post_processing_dtype is float32"}
    assert "Sampling in float32 by vLLM's own sampler" in reply["log"]


def test_speculative_decoding_gives_the_tokens_of_plain_decoding(model, together, tmp_path):
    """Drafts by n-grams: greedy and seeded requests alike, with penalties, in one batch, and no fallback."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    greedy = [0, 1, 2, 4, 7]  # vLLM refuses logit bias, min-p and min-tokens together with drafts
    seeded = [0, 1, 3]
    pairs = [(prompt, GREEDY[i]) for i in greedy for prompt in PROMPTS] + [(PROMPTS[0], SEEDED[i]) for i in seeded]
    reply = ask(model, tmp_path, pairs, llm={"speculative_config": ngram})
    start = len(GREEDY) * len(PROMPTS)
    expected = [together["tokens"][i * len(PROMPTS) + j] for i in greedy for j in range(len(PROMPTS))]
    assert reply["tokens"] == expected + [together["tokens"][start + i] for i in seeded]
    count = len(PROMPTS)
    assert_same_scores(reply["logprobs"][4 * count : 5 * count], together["logprobs"][7 * count : 8 * count])
    assert reply["fallbacks"] == [{}]
