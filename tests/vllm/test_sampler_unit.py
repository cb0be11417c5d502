"""Our sampler beside vLLM's own on the same metadata, without an engine: tokens, scores, and what is read back."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from gcu_compile.kernels.sampling import rejection_eager
from gcu_compile.kernels.tolerance import tolerance
from vllm_integration.rejection_sampler import GcuRejectionSampler
from vllm_integration.sampler import GcuSampler

pytestmark = pytest.mark.vllm
VOCAB = 211
CPU = torch.device("cpu")
MODES = ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]
# Each request asks for something else.
REQUESTS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logit_bias": {7: 4.0, 9: -20.0}},
    {"temperature": 0.8, "top_k": 9, "frequency_penalty": 0.4},
    {"temperature": 1.3, "top_p": 0.7, "min_p": 0.05, "bad_words": []},
    {"temperature": 1.0, "min_tokens": 5, "stop_token_ids": [3, 4], "presence_penalty": 0.6},
    {
        "temperature": 0.0,
        "min_tokens": 5,
        "stop_token_ids": [3],
        "structured_outputs": StructuredOutputsParams(regex="a"),
    },
    {
        "temperature": 0.7,
        "min_tokens": 5,
        "stop_token_ids": [5],
        "structured_outputs": StructuredOutputsParams(regex="a"),
    },
]


def batch(requests=REQUESTS, **more):
    """A runner with the host's side of an input batch, and its metadata."""
    rows, source = len(requests), np.random.default_rng(3)
    params = [SamplingParams(**one) for one in requests]
    outputs = [source.integers(0, VOCAB, 4).tolist() for _ in range(rows)]
    prompts = source.integers(0, VOCAB, (rows, 6))
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows))
    processors = [
        MinTokensLogitsProcessor(config, CPU, False),
        LogitBiasLogitsProcessor(config, CPU, False),
        MinPLogitsProcessor(config, CPU, False),
    ]
    added = [(row, one, prompts[row].tolist(), outputs[row]) for row, one in enumerate(params)]
    for processor in processors:
        processor.update_state(BatchUpdate(batch_size=rows, removed=[], added=added, moved=[]))

    def numbers(name, dtype=torch.float32):
        return torch.tensor([getattr(one, name) for one in params], dtype=dtype)

    penalties = {f"{name}_penalties": numbers(f"{name}_penalty") for name in ("frequency", "presence", "repetition")}
    mask = torch.zeros(rows, VOCAB, dtype=torch.bool)
    mask[rows // 3, ::3] = True
    top_k = numbers("top_k", torch.int32)
    metadata = SamplingMetadata(
        temperature=numbers("temperature"),
        all_greedy=False,
        all_random=False,
        top_p=numbers("top_p"),
        top_k=torch.where(top_k <= 0, VOCAB, top_k),
        generators={},
        max_num_logprobs=None,
        no_penalties=False,
        prompt_token_ids=torch.from_numpy(prompts),
        **penalties,
        output_token_ids=outputs,
        allowed_token_ids_mask=mask,
        bad_words_token_ids={rows // 2: [[50], [outputs[rows // 2][-1], 60], [outputs[rows // 2][-1] ^ 1, 61]]},
        logitsprocs=LogitsProcessors(processors),
    )
    for name, value in more.items():
        setattr(metadata, name, value)
    hosts = {f"{name}_cpu": value.numpy() for name, value in penalties.items()}
    inputs = SimpleNamespace(
        **hosts,
        token_ids_cpu=prompts.astype(np.int32),
        num_prompt_tokens=np.full(rows, 6),
        num_tokens_no_spec=np.full(rows, 10),
        req_ids=[f"request {row}" for row in range(rows)],
    )
    return SimpleNamespace(input_batch=inputs), metadata


def logits_of(dtype):
    x = torch.randn(len(REQUESTS), VOCAB, generator=torch.Generator().manual_seed(4)) * 3
    x[:, 50] = 9  # a bad word's
    x[5] = -torch.inf  # the grammar allows nothing but the stop token
    x[5, 3] = 0.5
    x[6, 5] = 12  # something else is left: the stop token stays forbidden
    return x.to(dtype)


def ours_and_upstream(mode, **more):
    runner, metadata = batch(**more)
    return GcuSampler(runner, logprobs_mode=mode), Sampler(logprobs_mode=mode), metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_scores_equal_vllms_in_every_mode(mode, dtype):
    """Top 5 and the ranks of a mixed batch. Tokens differ where drawn; greedy ones are the same."""
    ours, upstream, metadata = ours_and_upstream(mode, max_num_logprobs=5)
    x = logits_of(dtype)
    got, expected = ours(x.clone(), metadata), upstream(x.clone(), metadata)
    greedy = [0, 1, 5]
    assert torch.equal(got.sampled_token_ids[greedy], expected.sampled_token_ids[greedy])
    assert not ours.fallbacks
    (ids, scores, ranks), (their_ids, their_scores, their_ranks) = (
        list(one.logprobs_tensors)[:3] for one in (got, expected)
    )
    limits = tolerance(torch.float32, VOCAB)
    torch.testing.assert_close(scores[:, 1:], their_scores[:, 1:], **limits)
    known = torch.isfinite(their_scores[:, 1:])  # the order of what is cut is open
    if dtype == torch.float32:
        assert torch.equal(ids[:, 1:][known], their_ids[:, 1:][known])
    torch.testing.assert_close(scores[greedy, 0], their_scores[greedy, 0], **limits)
    assert torch.equal(ranks[greedy], their_ranks[greedy]) and ids.dtype == their_ids.dtype


@pytest.mark.parametrize("mode", MODES)
def test_scores_of_given_tokens_equal_vllms(mode):
    ours, upstream, metadata = ours_and_upstream(mode, logprob_token_ids={1: [7, 9], 2: [11]})
    x = logits_of(torch.float32)
    got, expected = ours(x.clone(), metadata).logprobs_tensors, upstream(x.clone(), metadata).logprobs_tensors
    torch.testing.assert_close(got.logprobs[:, 1:], expected.logprobs[:, 1:], **tolerance(torch.float32, VOCAB))
    assert torch.equal(got.logprob_token_ids[:, 1:], expected.logprob_token_ids[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_prompts_equal_vllms(dtype):
    ours, upstream, _ = ours_and_upstream("raw_logprobs")
    x, ids = logits_of(dtype)[:5], torch.tensor([1, 2, 50, 7, 9])
    got = ours.gather_logprobs(ours.compute_logprobs(x), 4, ids)
    expected = upstream.gather_logprobs(upstream.compute_logprobs(x), 4, ids)
    torch.testing.assert_close(got.logprobs, expected.logprobs, **tolerance(torch.float32, VOCAB))
    assert torch.equal(got.selected_token_ranks, expected.selected_token_ranks)
    raw = ours.gather_logprobs(x.float(), 4, ids)  # logprobs_mode is logits
    torch.testing.assert_close(raw.logprobs[:, 0], x.float()[torch.arange(5), ids], rtol=0, atol=0)


def test_draws_equal_upstreams_on_equal_noise_in_float32(monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_POST_PROCESSING_DTYPE", "float32")
    ours, upstream, metadata = ours_and_upstream("raw_logprobs")
    assert not ours.original
    x = logits_of(torch.bfloat16)
    for seed in range(50):
        torch.manual_seed(seed)
        expected = upstream(x.clone(), metadata).sampled_token_ids
        torch.manual_seed(seed)
        assert torch.equal(ours(x.clone(), metadata).sampled_token_ids, expected)
    assert ours.fallbacks == {"post_processing_dtype is float32": 50}


@pytest.mark.parametrize("mode", MODES)
def test_kept_set_is_vllms(mode):
    """200 steps of the mixed batch: every token drawn is one that vLLM's chain keeps, and they vary."""
    ours, upstream, metadata = ours_and_upstream("processed_logits", max_num_logprobs=VOCAB)
    x = logits_of(torch.float32)
    shown = upstream(x.clone(), metadata).logprobs_tensors
    kept = torch.zeros(len(x), VOCAB, dtype=torch.bool)
    kept.scatter_(1, shown.logprob_token_ids[:, 1:].long(), torch.isfinite(shown.logprobs[:, 1:]))
    metadata.max_num_logprobs = None
    drawn = torch.cat([ours(x, metadata).sampled_token_ids for _ in range(200)], dim=1).long()
    assert bool(kept.gather(1, drawn)[[2, 3, 4, 6]].all())
    assert all(len(drawn[row].unique()) > 3 for row in (2, 3, 4))
    assert (drawn[5] == 3).all() and not (drawn[6] == 5).any()


@contextmanager
def nothing_is_read_back():
    """Fails on what makes the host wait for a device. `meta` would forbid too much, a CPU allows all: so by name."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"Tensor.{name} in a step"))
        yield


def test_a_step_reads_nothing_back():
    ours, _, metadata = ours_and_upstream("processed_logprobs", max_num_logprobs=3)
    x = logits_of(torch.bfloat16)
    with nothing_is_read_back():
        ours(x, metadata)
    with pytest.raises(pytest.fail.Exception), nothing_is_read_back():
        x.sum().item()


def speculated(requests, with_probabilities, mode="raw_logprobs", **more):
    runner, metadata = batch(requests, bad_words_token_ids={}, **more)
    drafts = [[11, 12, 13], [], [21, 22], [31], [41], [51], [61]][: len(requests)]
    metadata.spec_token_ids = drafts
    metadata.allowed_token_ids_mask = None
    spec = SpecDecodeMetadata.make_dummy(drafts, CPU)
    rows = sum(map(len, drafts)) + len(drafts)
    counts = torch.tensor(spec.num_draft_tokens)
    spec.bonus_logits_indices = (spec.cu_num_sampled_tokens - 1).long()
    spec.target_logits_indices = torch.tensor(sorted(set(range(rows)) - set(spec.bonus_logits_indices.tolist())))
    x = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(9)) * 2
    q = torch.randn(int(counts.sum()), VOCAB, generator=torch.Generator().manual_seed(8)).softmax(-1)
    sampler = GcuSampler(runner, logprobs_mode=mode)
    return GcuRejectionSampler(sampler), spec, q if with_probabilities else None, x, metadata


@pytest.mark.parametrize("with_probabilities", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_speculation_with_scores_equals_vllms_where_it_is_greedy(mode, with_probabilities):
    """Greedy requests with penalties and min_tokens, their drafts partly right: tokens, scores and ranks."""
    greedy = [{**one, "temperature": 0.0} for one in REQUESTS[:5]]
    greedy = [{k: v for k, v in one.items() if k not in ("logit_bias", "min_p")} for one in greedy]
    ours, spec, q, x, metadata = speculated(greedy, with_probabilities, mode, max_num_logprobs=3)
    metadata.temperature, metadata.all_greedy = None, True
    x[0, 11] = x[1, 12] = 30.0  # two drafts are right
    got = ours(spec, q, x.clone(), metadata)
    assert not ours.sampler.fallbacks
    # vLLM's own, but for the acceptance itself, which it has as a Triton kernel only.
    ours.sampler = upstream = Sampler(logprobs_mode=mode)
    shown = "processed_logits" if mode.startswith("processed") else "raw_logits"
    bonus = upstream(x[spec.bonus_logits_indices], replace(metadata, max_num_logprobs=-1), True, shown)
    raw = x[spec.target_logits_indices]
    target = ours.apply_logits_processors(raw.clone(), metadata, spec)
    tokens = rejection_eager.assemble(
        target.argmax(-1),
        spec.draft_token_ids.long(),
        torch.cat([torch.zeros(1), spec.cu_num_draft_tokens]).long(),
        bonus.sampled_token_ids.flatten(),
        spec.max_spec_len,
    )
    chosen = target if shown == "processed_logits" else raw
    tensors = ours._get_logprobs_tensors(3, spec, x, chosen, bonus.logprobs_tensors.logprobs, tokens)
    assert torch.equal(got.sampled_token_ids, tokens.to(torch.int32))
    assert tokens[0].tolist()[:2] == [11, 12]
    there = (tokens >= 0).flatten()
    limits = tolerance(torch.float32, VOCAB)
    for mine, theirs in zip(list(got.logprobs_tensors)[:3], list(tensors)[:3], strict=True):
        torch.testing.assert_close(mine[there], theirs[there].to(mine.dtype), **limits)


def test_speculation_reads_nothing_back():
    ours, spec, _, x, metadata = speculated(REQUESTS[2:5], False, "processed_logprobs", max_num_logprobs=2)
    with nothing_is_read_back():
        ours(spec, None, x, metadata)
