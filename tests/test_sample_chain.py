"""Chains with symbolic sizes, with a tensor of settings, behind masks and penalties: what they keep is what plain torch
keeps, token by token."""

import re

import pytest
import torch

from gcu_compile import backend
from gcu_compile import post_processing as pp
from gcu_compile.kernels.host import sample as host
from gcu_compile.kernels.sampling import eager
from tests.test_post_processing_rules import INF, know_nothing, lowered

VOCAB = 997


def vllm(x, t, k, p):
    """vLLM's top-k and top-p, all settings per row."""
    x = x.float() / t.unsqueeze(1)
    ordered, order = x.sort(dim=-1, descending=False)
    kth = ordered.gather(1, (ordered.size(1) - k.to(torch.long)).unsqueeze(1))
    ordered = ordered.masked_fill(ordered < kth, -INF)
    cut = ordered.softmax(-1).cumsum(-1) <= 1 - p.unsqueeze(1)
    cut[:, -1] = False
    ordered = ordered.masked_fill(cut, -INF)
    return ordered.scatter(1, order, ordered).softmax(-1)


def nucleus(x, p, t=0.7):
    x = x.float() / t
    ordered, order = x.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    cut = probabilities.cumsum(-1) - probabilities >= p
    return x.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -INF).softmax(-1)


def masked(x, mask):
    return nucleus(x.masked_fill(mask, -INF), 0.8)


def allowed(x, mask):
    return pp.softmax(pp.top_k(pp.temperature(torch.where(mask, x, -INF), 0.7), 20))


def added(x, mask):
    return nucleus(x.float() + mask, 0.8)


def penalised(x, counts, prompt):
    return nucleus(pp.penalise(x, counts, prompt, 1.2, 0.3, 0.1), 0.8)


def settings(rows):
    return torch.rand(rows) + 0.3, torch.randint(1, 60, (rows,)), torch.rand(rows) * 0.9 + 0.05


def truths(rows):
    return torch.rand(rows, VOCAB) > 0.5


# name -> chain up to the probabilities, its other arguments for so many rows, arguments of the operation
CHAINS = {
    "per row": (vllm, settings, {"temperature", "top_k", "top_p"}),
    "top-p column": (nucleus, lambda rows: (torch.rand(rows, 1),), {"temperature", "top_p"}),
    "one temperature": (lambda x, t: nucleus(x, 0.8, t), lambda rows: (torch.tensor(1.3),), {"temperature", "top_p"}),
    "min-p": (
        lambda x, m: pp.softmax(pp.min_p(pp.temperature(x, 1.25), m)),
        lambda rows: (torch.rand(rows, 1) * 0.3,),
        {"temperature", "min_p"},
    ),
    "computed p": (lambda x, q: nucleus(x, 1 - q * q), lambda rows: (torch.rand(rows, 1),), {"temperature", "top_p"}),
    "numbers": (lambda x: nucleus(x, 0.8), lambda rows: (), {"temperature", "top_p"}),
    "mask": (masked, lambda rows: (truths(rows),), {"temperature", "top_p", "forbidden"}),
    "one mask": (masked, lambda rows: (truths(1)[0],), {"temperature", "top_p", "forbidden"}),
    "allowed": (allowed, lambda rows: (truths(rows),), {"temperature", "top_k", "forbidden"}),
    "added mask": (added, lambda rows: (torch.where(truths(rows), 0.0, -INF),), {"temperature", "top_p"}),
    "penalties": (
        penalised,
        lambda rows: (torch.randint(0, 3, (rows, VOCAB)), truths(rows)),
        {"temperature", "top_p"},
    ),
}


def kept(fn, args, monkeypatch, dynamic, more=()):
    """Compiles `draw(fn(args))`, runs it on `args` and on each of `more`, and holds what the operation may draw against
    plain torch. Returns the call's arguments and the report."""
    calls = []
    run = host.run
    know_nothing(monkeypatch)
    monkeypatch.setattr(host, "run", lambda logits, **asked: calls.append((logits, asked)) or run(logits, **asked))
    _, report, compiled = lowered(lambda *some: torch.multinomial(fn(*some), 1), *args, dynamic=dynamic)
    assert report.fused["sample_chain"] == 1, [m.reason for m in report.matches if m.rule == "sample_chain"]
    with torch.no_grad():
        for some in more:
            compiled(*some)
    assert len(backend.reports) == 1, "compiled again"
    for some, (logits, asked) in zip([args, *more], calls, strict=True):
        names = ("temperature", "top_k", "top_p", "min_p")
        z = eager.adjusted(logits, asked.get("forbidden"))
        found, weights = eager.kept_set(z, **{name: asked.get(name) for name in names})
        expected = fn(*some)
        assert torch.equal(found, expected > 0)
        mass = torch.where(found, weights, 0.0)
        torch.testing.assert_close((mass / mass.sum(-1, keepdim=True)).float(), expected, rtol=1e-4, atol=1e-7)
    return calls[0], report


@pytest.mark.parametrize(
    ("dtype", "dynamic"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("name", CHAINS)
def test_keeps_what_plain_torch_keeps(name, dtype, dynamic, monkeypatch):
    """Dynamic: three numbers of rows, one compilation."""
    fn, others, expected = CHAINS[name]
    torch.manual_seed(5)
    x = torch.randn(14, VOCAB) * 3
    if dtype == torch.bfloat16:  # no equal logits: plain torch leaves those at a threshold to chance
        values = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[(values > 1e-4) & (values < 8)]
        values = torch.cat([-values, values])
        x = torch.stack([values[torch.randperm(len(values))[:VOCAB]] for _ in range(14)])
    more = [(x[:n], *others(n)) for n in (2, 14)] if dynamic else []
    (logits, asked), _ = kept(fn, (x[:5], *others(5)), monkeypatch, dynamic, more)
    assert {key for key, value in asked.items() if value is not None} - {"seeds", "positions"} == expected
    if name not in ("added mask", "penalties"):
        assert logits.dtype == dtype, "logits are read in the dtype that they have"


def test_a_symbolic_vocabulary(monkeypatch):
    args = [(torch.randn(3, vocab) * 3, *settings(3)) for vocab in (997, 640, 2048)]
    kept(vllm, args[0], monkeypatch, True, args[1:])


def test_top_k_that_is_a_share_of_a_symbolic_vocabulary_stays_that_share(monkeypatch):
    """Not the 49 that it is for the first vocabulary."""
    args = [(torch.randn(3, vocab),) for vocab in (997, 640, 2048)]
    kept(lambda x: pp.softmax(pp.top_k(x.float(), x.size(1) // 20)), args[0], monkeypatch, True, args[1:])


def test_python_numbers_that_became_symbols(monkeypatch):
    """dynamic=True makes inputs of a function's numbers: any k, one compilation."""
    args = [(torch.randn(3, VOCAB), k, t) for k, t in ((20, 0.7), (31, 1.5))]
    (_, asked), _ = kept(lambda x, k, t: pp.softmax(pp.top_k(x.float() / t, k)), args[0], monkeypatch, True, args[1:])
    assert asked["top_k"].tolist() == [20] * 3


def test_the_last_position_of_a_sequence(monkeypatch):
    """logits[:, -1] of [batch, sequence, vocabulary]."""
    args = [(torch.randn(batch, 4, VOCAB) * 3,) for batch in (3, 5)]
    kept(lambda x: nucleus(x[:, -1], 0.8), args[0], monkeypatch, True, args[1:])


def test_a_clamped_temperature_is_taken_as_the_chain_has_it(monkeypatch):
    """vLLM divides greedy rows by 1: the setting is what stands in the division, not the input."""
    t = torch.tensor([0.0, 0.5, 1.0])

    def fn(x, t):
        return (x / torch.where(t < 1e-5, 1.0, t).unsqueeze(1)).softmax(-1)

    (_, asked), _ = kept(fn, (torch.randn(3, VOCAB), t), monkeypatch, False)
    assert asked["temperature"].tolist() == [1.0, 0.5, 1.0]


def test_what_comes_before_the_chain_stays_and_the_report_says_so(monkeypatch):
    x = torch.randn(3, VOCAB)
    _, report = kept(lambda x: nucleus(x * x, 0.8), (x,), monkeypatch, False)
    (record,) = (match for match in report.matches if match.rule == "sample_chain")
    assert record.reason.startswith("from mul on") or record.reason.startswith("from pow"), record.reason


NEAR = {
    "a weight a row": (lambda x, p: x.softmax(-1) * (1 + p * torch.arange(VOCAB)), "is not temperature, top-k, top-p"),
    "mask after the softmax": (lambda x, p: x.softmax(-1) * (x > p), "is not temperature, top-k, top-p"),
    "cumulative sums": (lambda x, p: x.softmax(-1).cumsum(-1) * p, "is not temperature, top-k, top-p"),
    "noise after the softmax": (lambda x, p: x.softmax(-1) / torch.rand_like(x), "computed from"),
    "the largest of all rows": (
        lambda x, p: torch.where(x.softmax(-1) < 0.3 * x.softmax(-1).amax(), 0.0, x.softmax(-1)),
        "is not temperature, top-k, top-p",
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_says_why(name, dynamic):
    fn, reason = NEAR[name]
    args = torch.randn(3, VOCAB), torch.rand(3, 1)
    _, report, _ = lowered(lambda *some: torch.multinomial(fn(*some), 1), *args, dynamic=dynamic)
    (record,) = (match for match in report.matches if match.rule == "sample_chain")
    assert record.status in ("skipped", "near_miss") and reason in record.reason, record


def test_inside_inductors_code():
    """The same through Inductor, as users have it: symbolic rows, settings of both kinds, a mask."""
    torch._dynamo.reset()
    backend.reports.clear()

    def fn(x, mask, t, k, p):
        return torch.multinomial(vllm(x.masked_fill(mask, -INF), t, k, p), 1)

    compiled = torch.compile(fn, backend="gcu", options={"enable_rules": ["sample_chain"]}, dynamic=True)
    with torch.no_grad():
        for rows in (3, 6):
            t, k, p = settings(rows)
            x, mask = torch.randn(rows, VOCAB), truths(rows)
            k[0] = 1  # one token can be drawn
            ids = compiled(x, mask, t, k, p)
            assert ids.shape == (rows, 1) and ids[0] == x[0].masked_fill(mask[0], -INF).argmax()
            assert (vllm(x.masked_fill(mask, -INF), t, k, p).gather(1, ids) > 0).all()
    (report,) = backend.reports
    assert report.fused["sample_chain"] == 1


def exponential(p):
    return torch.empty_like(p).exponential_()


# Spelling -> the draw of a chain's probabilities, or of its logits.
RACES = {
    "vllm": lambda x: (nucleus(x, 0.8) / exponential(x.float())).argmax(-1),
    "uniform": lambda x: (nucleus(x, 0.8) / -torch.rand_like(x.float()).log()).argmax(-1),
    "log1p": lambda x: (nucleus(x, 0.8) / -torch.log1p(-torch.rand_like(x.float()))).argmax(-1),
    "rate": lambda x: (nucleus(x, 0.8) * torch.empty_like(x.float()).exponential_(3.0).reciprocal()).argmax(-1),
    "gumbel": lambda x: (x.float() / 0.7 - (-torch.rand_like(x.float()).log()).log()).argmax(-1),
    "added": lambda x: (pp.top_k(x.float(), 20) + -exponential(x.float()).log()).argmax(-1),
}
SETTINGS = ("temperature", "top_k", "top_p", "min_p")
MEANT = {"gumbel": {"temperature": 0.7}, "added": {"temperature": 1.0, "top_k": 20}}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", RACES)
def test_a_race_with_exponential_noise_is_a_draw(monkeypatch, name, dynamic):
    """argmax(p / e) draws from p: 4000 rows alike give each token as often as its probability says."""
    rows, vocab, seen = 4000, 61, []
    run = host.run
    know_nothing(monkeypatch)
    monkeypatch.setattr(host, "run", lambda logits, **asked: seen.append(asked) or run(logits, **asked))
    x = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5)) * 2
    ids, report, _ = lowered(RACES[name], x.expand(rows, vocab).contiguous(), dynamic=dynamic)
    assert report.fused["sample_chain"] == 1 and ids.shape == (rows,)
    meant = MEANT.get(name, {"temperature": 0.7, "top_p": 0.8})
    given = {key: value[:1] for key, value in seen[-1].items() if key in SETTINGS and value is not None}
    assert {key: value.item() for key, value in given.items()} == pytest.approx(meant)
    kept, weights = eager.kept_set(x, **given)
    expected = torch.where(kept, weights, 0.0)[0].double()
    expected *= rows / expected.sum()
    counts = torch.bincount(ids, minlength=vocab).double()
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    # Chi-square: its mean is the degrees of freedom, its deviation sqrt(2 n); five of them are a chance of 1e-5.
    chi = ((counts - expected)[large] ** 2 / expected[large]).sum()
    freedom = int(large.sum()) - 1
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_a_race_leaves_no_noise_behind():
    _, report, _ = lowered(RACES["vllm"], torch.randn(3, VOCAB))
    after = report.steps[-1].ops_after
    assert "gcu.sample" in " ".join(after)
    assert not {name for name in after if re.search(r"exp|log|sort|\brand\b", name)}, after


# Not a race by one exponential number a token -> what the reason says.
NOT_RACES = {
    "normal": (lambda x: (nucleus(x, 0.8) / torch.randn_like(x)).argmax(-1), "computed from . values"),
    "uniform": (lambda x: (nucleus(x, 0.8) / torch.rand_like(x)).argmax(-1), "not that of an exponential"),
    "squared": (lambda x: (nucleus(x, 0.8) / exponential(x) ** 2).argmax(-1), "not that of an exponential"),
    "sorted": (lambda x: (nucleus(x, 0.8) / exponential(x).sort(-1).values).argmax(-1), "not that of an exponential"),
    "per row": (lambda x: (nucleus(x, 0.8) / exponential(x[:, :1])).argmax(-1), "not one number a token"),
    "shared": (lambda x: [(e := exponential(x)), (nucleus(x, 0.8) / e).argmax(-1) + e[:, 0]][1], "used elsewhere"),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NOT_RACES)
def test_other_noise_is_refused(name, dynamic):
    fn, reason = NOT_RACES[name]
    _, report, _ = lowered(fn, torch.randn(3, VOCAB), dynamic=dynamic)
    (record,) = (match for match in report.matches if match.rule == "sample_chain")
    assert record.status == "near_miss" and re.search(reason, record.reason), record.reason


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_greedy_chain_behind_a_mask(dynamic):
    x, mask = torch.randn(4, VOCAB), truths(4)
    result, report, _ = lowered(
        lambda x, m, t: pp.greedy(pp.top_k(pp.forbid(x, m) / t, 9)), x, mask, torch.rand(4, 1), dynamic=dynamic
    )
    assert report.fused["sample_chain"] == 1
    assert torch.equal(result, x.masked_fill(mask, -INF).argmax(-1, keepdim=True))
