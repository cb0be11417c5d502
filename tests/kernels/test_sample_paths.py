"""`gcu::sample` where its host kernel takes another path: guesses that miss, ties, limits that bits decide."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample import DTYPES, ISAS, available, check, numbers

BLOCK, GROUPS = 4096, 32  # of sampling/logits.h
SHARES = [1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999]


def normal(rows, vocab, seed, scale=2.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sampled(vocab):
    """Which logits the guess of a threshold rests on, beside the groups' maxima: `place` in `Groups::take`."""
    found = torch.zeros(vocab, dtype=torch.bool)
    for block, begin in enumerate(range(0, vocab, BLOCK)):
        n = -(-min(BLOCK, vocab - begin) // GROUPS)
        place = begin + block * 37 % n * GROUPS
        found[place : place + GROUPS] = True
    return found


def row(values, rows, dtype=torch.float32):
    return torch.tensor([values[i % len(values)] for i in range(rows)], dtype=dtype)


def check_shares(x, **asked):
    """Each row with another p."""
    x = x.expand(len(SHARES), -1).contiguous()
    check(x, *numbers(len(x), 3), temperature=torch.ones(len(x)), top_p=row(SHARES, len(x)), **asked)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", ["below", "above", "spread", "shifted"])
def test_guesses_that_miss(hidden, dtype, isa, monkeypatch):
    """What the guess looks at is unlike the rest of the row: too little, too much, or another distribution."""
    if not available(isa, monkeypatch):
        return
    x = normal(1, 20011, 1)
    seen = sampled(x.shape[1])
    match hidden:
        case "below":
            x[:, seen] = -30
        case "above":
            x[:, seen] = 9
        case "spread":
            x[:, seen] *= 4
        case "shifted":
            x[:, seen] += 3
    check_shares(x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_guess_in_a_row_of_two_halves(dtype):
    """Blocks unlike each other, so that no sample of one tells of the next; one prime vocabulary and a large one."""
    for vocab in (40009, 131071):
        x = normal(1, vocab, 2)
        x[:, : vocab // 2] -= 6
        x[:, ::4097] += 9
        check_shares(x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 0.3, -0.3])
def test_ties_at_the_threshold_in_every_block(level, dtype):
    """A twentieth of the row above, a tenth equal, the rest far below, or not there: NaN of both signs and -inf."""
    vocab = 20011
    hit = torch.rand(1, vocab, generator=torch.Generator().manual_seed(4))
    x = torch.full((1, vocab), level)
    x[hit > 0.15] = level - 7
    x = torch.where(hit < 0.05, level + 1 + hit * 20, x).to(dtype)
    if level == 0:
        x[:, ::2] = torch.where(x[:, ::2] == 0, -x[:, ::2], x[:, ::2])  # 0 and -0 are one value
    x[(hit > 0.3) & (hit < 0.4)] = torch.nan
    x[(hit > 0.4) & (hit < 0.5)] = -torch.tensor(torch.nan, dtype=dtype)
    x[(hit > 0.5) & (hit < 0.6)] = -torch.inf
    x = x.expand(12, -1).contiguous()
    shares = torch.linspace(0.3, 0.999, 12)
    check(x, *numbers(12, 5), temperature=torch.ones(12), top_p=shares)
    check(x, *numbers(12, 5), temperature=torch.ones(12), top_k=torch.arange(200, 2600, 200, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_p_keeps_to_the_ties_that_top_k_kept(dtype):
    """More tokens than are gathered at once, the last of them equal, and a pass that packs what it gathers."""
    vocab = 20011
    hit = torch.rand(1, vocab, generator=torch.Generator().manual_seed(6))
    x = torch.where(hit < 0.28, 2 + 7 * hit, torch.where(hit < 0.32, 1.0, -3.0)).to(dtype)
    above, ties = int((x > 1).sum()), int((x == 1).sum())
    assert above > BLOCK and ties > 500
    k = above + torch.arange(1, ties, ties // 8, dtype=torch.int32)
    x = x.expand(len(k), -1).contiguous()
    for p in (0.9, 0.999, 0.999999):
        check(x, *numbers(len(k), 7), temperature=torch.ones(len(k)), top_k=k, top_p=torch.full((len(k),), p))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_that_is_adjusted(dtype):
    """The other blocks are read where they lie."""
    x = normal(3, 20011, 8).to(dtype)
    asked = {"bias_offsets": torch.tensor([0, 1, 2, 2]), "bias_ids": torch.tensor([9000, 20010], dtype=torch.int32)}
    for value in (12.0, -torch.inf, 0.1):
        asked["bias_values"] = torch.full((2,), value)
        for p in (0.5, 0.9):
            check(x, *numbers(3, 9), temperature=torch.ones(3), top_p=torch.full((3,), p), **asked)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 40, 900, 6000])
def test_tokens_that_are_touched_among_the_best(k, dtype, isa, monkeypatch):
    """By bias, by penalties, by both and by neither: into the best and out of them, side by side, at the edges of
    blocks and groups, one in a block and many."""
    if not available(isa, monkeypatch):
        return
    rows, vocab = 4, 20011
    x = normal(rows, vocab, 12).to(dtype)
    edges = [0, 1, 31, 32, 33, 4095, 4096, 4097, 8190, 8191, 12288, 20010]
    generator = torch.Generator().manual_seed(13)
    best = x[0].float().topk(30).indices.tolist()
    ids = sorted({*edges, *best, *torch.randperm(vocab, generator=generator)[:300].tolist()})
    history = torch.tensor(ids[::2] * 2, dtype=torch.int32)
    biased = torch.tensor(sorted([*ids[::3], 4095, 4095]) * 2, dtype=torch.int32)
    asked = {
        "history_offsets": torch.tensor([0, len(history) // 2, len(history) // 2, len(history), len(history)]),
        "history_ids": history,
        "history_counts": torch.randint(0, 3, (len(history),), generator=generator, dtype=torch.int32),
        "bias_offsets": torch.tensor([0, 0, 0, len(biased) // 2, len(biased)]),
        "bias_ids": biased,
        "bias_values": torch.randn(len(biased), generator=generator) * 6,
        "repetition": torch.tensor([1.3, 1.0, 0.5, 1.0]),
        "frequency": torch.tensor([-2.1, 0.0, 0.7, 0.0]),
        "presence": torch.tensor([-3.3, 0.0, 1.1, 0.0]),
    }
    asked["bias_values"][::7] = -torch.inf
    if k == 2:
        asked["forbidden"] = torch.rand(rows, vocab, generator=generator) < 0.5
    top_k, whole = torch.full((rows,), k, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    for more in ({"top_k": top_k}, {"top_k": top_k, "top_p": torch.full((rows,), 0.8)}, {"top_k": whole}):
        check(x, *numbers(rows, 14), temperature=torch.ones(rows), **asked, **more)
    check(x, *numbers(rows, 14), temperature=torch.ones(rows), top_p=torch.full((rows,), 0.8), **asked)
    check(x, *numbers(rows, 14), temperature=torch.zeros(rows), **asked)


@st.composite
def rows_to_mislead(draw):
    """A row of several levels and distributions, in stripes that fall in and out of step with blocks and groups."""
    vocab = draw(st.sampled_from([4096, 4099, 12289, 20011]))
    x = normal(1, vocab, draw(st.integers(0, 99)), draw(st.sampled_from([0.01, 1.0, 3.0])))
    for _ in range(draw(st.integers(0, 3))):
        stripe = slice(draw(st.integers(0, 99)), None, draw(st.sampled_from([1, 2, 31, 32, 33, 128, 4095, 4096, 4097])))
        value = draw(st.sampled_from([-torch.inf, torch.nan, -20.0, -1.0, 0.0, 2.0, 9.0, 40.0]))
        x[:, stripe] = x[:, stripe] + value if draw(st.booleans()) else value
    if draw(st.booleans()):
        x[:, sampled(vocab)] = draw(st.sampled_from([-torch.inf, -5.0, 0.0, 5.0]))
    return x.to(draw(st.sampled_from(DTYPES))), draw(st.floats(1e-6, 1.0)), draw(st.sampled_from([0.1, 1.0, 3.0]))


def check_misled(case):
    x, p, temperature = case
    p = torch.tensor([p], dtype=torch.float32)
    check(x, *numbers(1, 11), temperature=torch.tensor([temperature]), top_p=p)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows_to_mislead())
def test_rows_to_mislead(case):
    check_misled(case)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(rows_to_mislead())
def test_long_sweep_of_rows_to_mislead(case):
    check_misled(case)
