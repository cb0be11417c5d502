"""`gcu::logprobs`, and `gcu::rejection_sample` with draft probabilities, in Triton's interpreter: what they mean."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton_sample import cases, row_of

from gcu_compile.kernels import registry
from gcu_compile.kernels.host import sample as host
from gcu_compile.kernels.sampling import logprobs_eager, rejection_eager
from gcu_compile.kernels.tolerance import tolerance

pytest.importorskip("triton")
from gcu_compile.kernels.triton import logprobs, rejection


def check_scores(x, tokens, count, normalised, **asked):
    """Ids and ranks exactly, scores within the tolerance table."""
    assert logprobs.refuses(x, tokens, count) is None
    got = logprobs.run(x, tokens, count, normalised, **asked)
    expected = logprobs_eager.logprobs(x, tokens, count, normalised, **asked)
    for mine, theirs, limits in zip(got, expected, ({"rtol": 0, "atol": 0}, None, {"rtol": 0, "atol": 0}), strict=True):
        torch.testing.assert_close(mine, theirs, **(limits or tolerance(torch.float32, x.shape[1])))
    return got


@st.composite
def scored(draw):
    x, asked, seed = draw(cases())
    tokens = torch.from_numpy(np.random.default_rng(seed % 2**32).integers(0, x.shape[1], (len(x), 1 + seed % 3)))
    return x, tokens, draw(st.sampled_from([0, 1, 5])), draw(st.booleans()), asked if draw(st.booleans()) else {}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(scored())
def test_scores_equal_the_meaning(case):
    *arguments, asked = case
    check_scores(*arguments, **asked)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=300, deadline=None)
@given(scored())
def test_long_sweep_of_scores(case):
    *arguments, asked = case
    check_scores(*arguments, **asked)


def test_all_of_a_small_vocabulary_those_that_are_cut_behind_by_id():
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0, -torch.inf], [-torch.inf] * 5])
    asked = {"temperature": torch.ones(2), "top_k": torch.tensor([3, 3], dtype=torch.int32)}
    ids, _, ranks = check_scores(x, torch.tensor([[3], [2]]), 9, True, **asked)
    assert ids.tolist() == [[3, 1, 3, 2, 0, 4], [2, 0, 1, 2, 3, 4]] and ranks.tolist() == [2, 5]


def test_more_of_the_best_than_the_kernel_finds_is_refused():
    assert "257 best" in logprobs.refuses(torch.zeros(1, 300), torch.zeros(1, 1, dtype=torch.int64), 257)


def drafts_of(x, seed, sharp):
    """Draft tokens that are likely, and the draft's probabilities: of nearly the same row."""
    source = torch.Generator().manual_seed(seed % 2**32)
    z = torch.where(x.isfinite(), x.float(), -30.0)
    q = (z + torch.randn(z.shape, generator=source) * sharp).softmax(-1)
    return torch.multinomial(q, 1, generator=source).squeeze(1), q


def check_drafts(x, seed, sharp, **asked):
    numbers = {"seeds": torch.arange(len(x)) + seed, "positions": torch.arange(len(x)) * 3 + 2**33}
    drafts, q = drafts_of(x, seed, sharp)
    got = rejection.run(x, drafts, q, **numbers, **asked)
    expected = rejection_eager.tokens(x, drafts, **numbers, draft_probabilities=q, **asked)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    return got, drafts


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([0.1, 1.0, 5.0]))
def test_drafts_with_probabilities_equal_the_meaning(case, sharp):
    x, asked, seed = case
    check_drafts(x, seed, sharp, **asked)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from([0.1, 1.0, 5.0]))
def test_long_sweep_of_drafts(case, sharp):
    x, asked, seed = case
    check_drafts(x, seed, sharp, **asked)


def test_some_drafts_are_accepted_and_others_replaced_as_on_the_host():
    x = torch.from_numpy(np.stack([row_of("normal", 300, np.random.default_rng(n)) for n in range(12)])).bfloat16()
    asked = {"temperature": torch.full((12,), 0.9), "top_p": torch.full((12,), 0.95)}
    got, drafts = check_drafts(x, 7, 1.0, **asked)
    assert 2 <= int((got == drafts).sum()) <= 10
    numbers = {"seeds": torch.arange(12) + 7, "positions": torch.arange(12) * 3 + 2**33}
    _, q = drafts_of(x, 7, 1.0)
    assert torch.equal(got, host.run(x, draft_ids=drafts, draft_probabilities=q, **numbers, **asked))


@pytest.mark.parametrize("name", ["logprobs", "rejection_sample"])
def test_the_operations_have_a_kernel_for_cards(name):
    assert {i.name: i.devices for i in registry.get(name).implementations}["triton"] == ("cuda", "gcu")
