"""`gcu::sample` in Triton's interpreter: keeps and draws exactly what the sorted float64 meaning says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.kernels import registry
from gcu_compile.kernels.host import sample as host
from gcu_compile.kernels.sampling import eager, rejection_eager

pytest.importorskip("triton")
from gcu_compile.kernels.triton import sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "peaked", "flat", "equal", "tied", "masked", "one", "nan", "infinite", "zeros", "all -inf"]
CHAIN = ("temperature", "top_k", "top_p", "min_p")


def row_of(kind, vocab, source):
    x = source.normal(size=vocab) * source.choice([0.01, 1, 4])
    hit = source.random(vocab)
    match kind:
        case "peaked":
            x[source.integers(vocab)] += 20
        case "flat":
            x *= 1e-3
        case "equal":
            x[:] = 0.5
        case "tied":
            x = np.round(x * 2) / 2
        case "masked":
            x[hit < 0.7] = -np.inf
        case "one":
            x[:] = -np.inf
            x[source.integers(vocab)] = 1
        case "nan":
            x[hit < 0.1] = np.nan
        case "infinite":
            x[hit < 0.01] = np.inf
        case "zeros":
            x = np.where(hit < 0.5, 0.0, -0.0)
        case "all -inf":
            x[:] = -np.inf
    return x


def check(x, seed, splits=None, **asked):
    """The kernel's kept set and draw against the meaning's."""
    rows = len(x)
    numbers = {"seeds": torch.arange(rows) + seed, "positions": torch.arange(rows) * 3 + 2**33}
    assert sample.refuses(x, **numbers, **asked) is None
    kept = torch.zeros(x.shape, dtype=torch.int8)
    ids = sample.run(x, kept=kept, splits=splits, **numbers, **asked)
    z = eager.adjusted(x, **{k: v for k, v in asked.items() if k not in CHAIN})
    expected, _ = eager.kept_set(z, **{k: v for k, v in asked.items() if k in CHAIN})
    torch.testing.assert_close(kept.bool(), expected, rtol=0, atol=0)
    torch.testing.assert_close(ids, eager.sample(x, **numbers, **asked), rtol=0, atol=0)
    return ids, numbers


@st.composite
def cases(draw):
    rows = draw(st.integers(1, 3))
    vocab = draw(st.sampled_from([2, 3, 17, 97, 1000, 4099, 8191, 8192, 20011]))
    source = np.random.default_rng(draw(st.integers(0, 999)))
    x = np.stack([row_of(draw(st.sampled_from(KINDS)), vocab, source) for _ in range(rows)])

    def row(values, dtype=torch.float32):
        return torch.tensor([draw(st.sampled_from(values)) for _ in range(rows)], dtype=dtype)

    asked = {"temperature": row([0.0, 0.3, 1.0, 2.0])}
    if draw(st.booleans()):
        asked["top_p"] = row([1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0])
    if draw(st.booleans()):
        asked["top_k"] = row([0, 1, 2, 7, 50, 5000, vocab // 2, vocab - 1, vocab], torch.int32)
    if draw(st.booleans()):
        asked["min_p"] = row([0.0, 1e-4, 0.01, 0.5, 1.0])
    return torch.from_numpy(x).to(draw(st.sampled_from(DTYPES))), asked, draw(st.integers(0, 2**62))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(cases())
def test_kept_set_and_draw_equal_the_meaning(case):
    x, asked, seed = case
    check(x, seed, splits=(1, 2, 4)[seed % 3], **asked)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=2000, deadline=None)
@given(cases())
def test_long_sweep(case):
    x, asked, seed = case
    check(x, seed, splits=(1, 2, 4)[seed % 3], **asked)


def test_a_large_vocabulary():
    x = torch.from_numpy(row_of("normal", 151936, np.random.default_rng(1)))[None].bfloat16()
    check(x, 5, temperature=torch.ones(1), top_p=torch.full((1,), 0.9))


def lists(rows, vocab, source, values):
    """Offsets, ascending unique ids of random length per row, and values."""
    ids = [np.sort(source.choice(vocab, source.integers(0, min(vocab, 60)), replace=False)) for _ in range(rows)]
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in ids])])
    return offsets, torch.from_numpy(np.concatenate(ids).astype(np.int32)), values(int(offsets[-1]))


@pytest.mark.parametrize("vocab", [97, 5003])
def test_mask_bias_and_penalties(vocab):
    rows, source = 4, np.random.default_rng(vocab)
    x = torch.from_numpy(np.stack([row_of("normal", vocab, source) for _ in range(rows)])).bfloat16()
    asked = {"temperature": torch.tensor([0.0, 1.0, 0.7, 1.5]), "top_p": torch.full((rows,), 0.95)}
    asked["forbidden"] = torch.from_numpy(source.random((rows, vocab)) < 0.3)
    bias = lists(rows, vocab, source, lambda n: torch.from_numpy(source.normal(size=n)).float())
    history = lists(rows, vocab, source, lambda n: torch.from_numpy(source.integers(0, 4, n)).int())
    bias[2][::5] = -torch.inf
    asked |= dict(zip(("bias_offsets", "bias_ids", "bias_values"), bias, strict=True))
    asked |= dict(zip(("history_offsets", "history_ids", "history_counts"), history, strict=True))
    asked |= {
        "repetition": torch.tensor([1.0, 1.3, 0.8, 2.0]),
        "frequency": torch.tensor([0.0, 0.5, -0.5, 1.0]),
        "presence": torch.tensor([0.0, 0.2, -1.0, 1.0]),
    }
    for seed, splits in enumerate((1, 2, 4)):
        check(x, seed, splits, **asked)


@pytest.mark.parametrize("target", ["gcu300", "gcu400", "cuda"])
def test_the_same_token_as_on_the_host_whatever_the_tile(target, monkeypatch):
    monkeypatch.setattr(sample, "target_of", lambda tensor: target)
    source = np.random.default_rng(3)
    x = torch.from_numpy(np.stack([row_of("normal", 5003, source) for _ in range(3)])).float()
    asked = {"temperature": torch.tensor([0.7, 1.0, 1.3]), "top_p": torch.full((3,), 0.97)}
    ids, numbers = check(x, 11, **asked)
    assert torch.equal(ids, host.run(x, **numbers, **asked))


def test_same_seed_same_token_in_any_batch_and_order():
    source = np.random.default_rng(4)
    x = torch.from_numpy(np.stack([row_of("normal", 3001, source) for _ in range(4)])).bfloat16()
    asked = {"temperature": torch.full((4,), 1.2), "top_k": torch.full((4,), 50, dtype=torch.int32)}
    numbers = {"seeds": torch.arange(4) - 2, "positions": torch.arange(4) + 5}
    whole = sample.run(x, **numbers, **asked)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {k: v[order] for k, v in (numbers | asked).items()}
    assert torch.equal(sample.run(x[order].contiguous(), **shuffled), whole[order])
    alone = {k: v[1:2] for k, v in (numbers | asked).items()}
    assert sample.run(x[1:2], **alone).item() == whole[1]


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(2, 5, dtype=torch.float64), "torch.float64"),
        (torch.zeros(5, 2).t(), "not contiguous"),
        (torch.zeros(1, 5).expand(70000, 5), "70000 rows"),
    ],
)
def test_refusals_say_why(x, reason):
    assert reason in sample.refuses(x)


def test_drafts_are_verified_as_the_meaning_says():
    operation = {i.name: i for i in registry.get("rejection_sample").implementations}["triton"]
    x = torch.from_numpy(np.stack([row_of("peaked", 500, np.random.default_rng(6)) for _ in range(5)])).float()
    numbers = {"seeds": torch.arange(5) + 3, "positions": torch.arange(5)}
    asked = {"temperature": torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0]), "top_p": torch.full((5,), 0.9)}
    drafts = eager.sample(x, **numbers, **asked)
    drafts[3] = (drafts[3] + 1) % 500  # one that is rejected
    arguments = (x, drafts, torch.tensor([0, 2, 2, 5]), torch.tensor([7, 8, 9]), *numbers.values(), 3)
    assert operation.refuses(*arguments, None, *asked.values()) is None
    expected = rejection_eager.rejection_sample(*arguments, **asked)
    assert torch.equal(operation.run(*arguments, **asked), expected)
    assert expected[0].tolist()[2] == 7 and expected[2].tolist()[2:] == [-1, -1]
