"""`gcu::logprobs`: the C++ kernel shows the tokens, scores and ranks that the sorted float64 meaning says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample import DTYPES, ISAS, KINDS, LARGE, VOCABULARIES, available, chains, lists, logits

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.sampling import LOGPROBS
from gcu_compile.kernels.tolerance import tolerance


def check(x, token_ids, count, normalised, **asked):
    """Ids and ranks exactly, scores within float32's tolerance for a sum over the vocabulary."""
    before = registry.calls["logprobs", "host_cpp"]
    ids, scores, ranks = torch.ops.gcu.logprobs(x, token_ids, count, normalised, **asked)
    assert registry.calls["logprobs", "host_cpp"] == before + 1
    expected = LOGPROBS.eager(x, token_ids, count, normalised, **asked)
    torch.testing.assert_close(ids, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(ranks, expected[2], rtol=0, atol=0)
    torch.testing.assert_close(scores, expected[1], **tolerance(torch.float32, x.shape[1]))
    return ids, scores, ranks


@st.composite
def cases(draw, vocabularies):
    x, asked, _ = draw(chains(vocabularies))
    rows, vocab = x.shape
    given_ids = torch.tensor([[draw(st.integers(0, vocab - 1)) for _ in range(2)] for _ in range(rows)])
    count = draw(st.sampled_from([0, 1, 5, 20, 1500, vocab]))
    return x, given_ids, count, draw(st.booleans()), asked if draw(st.booleans()) else {}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases(VOCABULARIES[:-1]))
def test_equals_the_meaning(case):
    *arguments, asked = case
    check(*arguments, **asked)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(cases(LARGE))
def test_large_vocabularies(case):
    *arguments, asked = case
    check(*arguments, **asked)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(cases([*VOCABULARIES, *LARGE]))
def test_long_sweep(case):
    *arguments, asked = case
    check(*arguments, **asked)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, monkeypatch):
    if not available(isa, monkeypatch):
        return
    asked = {"temperature": torch.tensor([0.0, 1.0, 0.5]), "top_p": torch.full((3,), 0.9)}
    for kind in KINDS:
        x = logits(kind, 3, 20011, DTYPES[len(kind) % 3], 5)
        check(x, torch.tensor([[1], [5], [19000]]), 9, True)
        check(x, torch.tensor([[1], [5], [19000]]), 9, True, **asked)


@pytest.mark.parametrize("normalised", [True, False])
def test_after_mask_bias_and_penalties(normalised):
    rows, vocab = 4, 4099
    x = logits("normal", rows, vocab, torch.bfloat16, 1)
    asked = {"temperature": torch.tensor([0.0, 1.0, 0.7, 1.5]), "min_p": torch.full((rows,), 0.01)}
    asked["forbidden"] = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(2)) < 0.3
    for kind, name, kind_dtype in (("bias", "values", torch.float32), ("history", "counts", torch.int32)):
        offsets, ids, values = lists(rows, vocab, 3, kind_dtype)
        asked |= {f"{kind}_offsets": offsets, f"{kind}_ids": ids, f"{kind}_{name}": values}
    asked |= {name: torch.tensor([1.0, 1.3, 0.8, 2.0]) for name in ("repetition", "frequency", "presence")}
    check(x, asked["history_ids"][:4].long().unsqueeze(1), 20, normalised, **asked)


def test_raw_scores_are_those_of_log_softmax():
    x = logits("normal", 3, 4099, torch.float32, 1)
    ids, scores, ranks = check(x, torch.tensor([[0], [7], [4098]]), 5, True)
    reference = x.double().log_softmax(-1)
    torch.testing.assert_close(scores.double(), reference.gather(1, ids.long()), **tolerance(torch.float32, x.shape[1]))
    assert torch.equal(ids[:, 1:].long(), reference.topk(5).indices)
    assert torch.equal(ranks, (reference >= reference.gather(1, ids[:, :1].long())).sum(-1))


def test_what_is_cut_stands_behind_by_id_and_a_row_with_nothing_left_is_minus_infinity():
    x = torch.tensor([[1.0, 3.0, 2.0, 0.0], [-torch.inf, torch.nan, -torch.inf, -torch.inf]])
    ids, scores, ranks = check(
        x, torch.tensor([[0], [2]]), 9, True, top_k=torch.tensor([2, 2], dtype=torch.int32), temperature=torch.ones(2)
    )
    assert ids.tolist() == [[0, 1, 2, 0, 3], [2, 0, 1, 2, 3]]
    assert scores[0, 1:3].exp().sum().item() == pytest.approx(1) and ranks.tolist() == [4, 4]
    assert torch.isneginf(scores[0, [0, 3, 4]]).all() and torch.isneginf(scores[1]).all()


def test_operation_is_compiled_through():
    x = logits("normal", 2, 97, torch.float32, 2)
    ids = torch.tensor([[1], [2]])
    run = torch.compile(lambda y: torch.ops.gcu.logprobs(y * 2, ids, 3, True), backend="gcu")
    for got, expected in zip(run(x), LOGPROBS.eager(x * 2, ids, 3, True), strict=True):
        torch.testing.assert_close(got, expected, **tolerance(torch.float32, 97))


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), r"token_ids is \(2,\), expected \[2, 1 or more\]"),
        (torch.zeros(3, 1, dtype=torch.int64), r"token_ids is \(3, 1\)"),
        (torch.full((2, 1), 97), "token_ids leave the vocabulary of 97"),
        (torch.full((2, 1), -1), "token_ids leave the vocabulary of 97"),
    ],
)
def test_bad_tokens_are_named(token_ids, message):
    x = logits("normal", 2, 97, torch.float32, 2)
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.gcu.logprobs(x, token_ids, 3, True)
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.gcu.logprobs(x.double(), token_ids, 3, True)  # the eager meaning refuses the same
