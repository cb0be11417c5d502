"""A user's own logits chain becomes one `gcu::sample`, however it is spelled, and a near miss says why not."""

import pytest
import torch

from gcu_compile import backend
from gcu_compile import post_processing as pp
from gcu_compile.kernels.sampling import eager, known

ROWS, VOCAB = 6, 997
INF = float("inf")


def huggingface(x):
    x = x.float() / 0.8
    x = x.masked_fill(x < torch.topk(x, 50)[0][:, -1:], -INF)
    ordered, order = torch.sort(x, descending=True)
    remove = ordered.softmax(-1).cumsum(-1) > 0.9
    remove[:, 1:] = remove[:, :-1].clone()
    remove[:, 0] = False
    return torch.multinomial(x.masked_fill(remove.scatter(1, order, remove), -INF).softmax(-1), 1)


def vllm(x):
    x = x.float() / 0.7
    ordered, order = x.sort(dim=-1, descending=False)
    keep = ordered.size(1) - 20
    ordered = ordered.masked_fill(ordered < ordered[:, keep : keep + 1], -INF)
    mask = ordered.softmax(-1).cumsum(-1) <= 1 - 0.85
    mask[:, -1] = False
    x = ordered.masked_fill(mask, -INF).scatter(1, order, ordered.masked_fill(mask, -INF))
    return torch.multinomial(x.softmax(-1), 1)


def ours(x):
    x = pp.top_p(pp.top_k(pp.min_p(pp.temperature(x, 1.25), 0.02), 40), 0.95)
    return pp.draw(pp.softmax(x))


# spelling -> settings that it means
CHAINS = {
    "huggingface": (huggingface, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
    "vllm": (vllm, {"temperature": 0.7, "top_k": 20, "top_p": 0.85}),
    "post_processing": (ours, {"temperature": 1.25, "top_k": 40, "top_p": 0.95, "min_p": 0.02}),
    "temperature": (lambda x: torch.multinomial((x * 2.5).softmax(-1), 1), {"temperature": 0.4}),
    "softmax": (lambda x: torch.multinomial(x.float().softmax(-1), 1), {"temperature": 1.0}),
    "top_k": (lambda x: pp.draw(pp.softmax(pp.top_k(x, 7))), {"temperature": 1.0, "top_k": 7}),
    "top_p": (lambda x: pp.draw(pp.softmax(pp.top_p(x.float(), 0.6))), {"temperature": 1.0, "top_p": 0.6}),
}


def lowered(fn, *args, enable=True, dynamic=False):
    torch._dynamo.reset()
    backend.reports.clear()
    options = {"inductor": False, "enable_rules": ["sample_chain"] if enable else []}
    compiled = torch.compile(fn, backend="gcu", options=options, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        result = compiled(*args)
    (report,) = backend.reports
    return result, report, compiled


def know_nothing(monkeypatch):
    """Every call of `gcu::sample` comes to `host.run`."""
    monkeypatch.setattr(known, "_known", {first: {} for first in known._known})
    monkeypatch.setattr(known, "_look", lambda *args: None)


def settings_of(monkeypatch, fn, x):
    """The settings with which the compiled chain calls the operation."""
    seen = []
    real = eager.sample
    from gcu_compile.kernels.host import sample as host

    run = host.run
    know_nothing(monkeypatch)
    monkeypatch.setattr(host, "run", lambda logits, **asked: seen.append(asked) or run(logits, **asked))
    result, report, _ = lowered(fn, x)
    assert report.fused["sample_chain"] == 1, [m.reason for m in report.matches]
    (asked,) = seen
    assert torch.equal(result.flatten(), real(x, **asked))
    return {
        name: round(float(asked[name][0]), 6)
        for name in ("temperature", "top_k", "top_p", "min_p")
        if asked.get(name) is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHAINS)
def test_every_spelling_becomes_one_sample(name, dtype, monkeypatch):
    fn, expected = CHAINS[name]
    x = (torch.randn(ROWS, VOCAB) * 3).to(dtype)
    if (name, dtype) == ("temperature", torch.bfloat16):  # scaled in bfloat16, not as the operation does
        result, report, _ = lowered(fn, x)
        assert report.fused["sample_chain"] == 0 and result.shape == (ROWS, 1)
        assert "not temperature, top-k, top-p and min-p by numbers" in report.matches[0].reason
        return
    assert settings_of(monkeypatch, fn, x) == expected


def test_nothing_of_the_chain_is_left_and_the_seed_is_torchs():
    x = torch.randn(ROWS, VOCAB)
    _, report, compiled = lowered(huggingface, x)
    after = report.steps[-1].ops_after
    assert not {name for name in after if any(word in name for word in ("sort", "topk", "cumsum", "exp"))}
    with torch.no_grad():
        torch.manual_seed(1)
        first = compiled(x)
        torch.manual_seed(1)
        assert torch.equal(compiled(x), first)
        assert any(not torch.equal(compiled(x), first) for _ in range(20))


def test_greedy_chain():
    x = torch.randn(ROWS, VOCAB).bfloat16()
    result, report, _ = lowered(lambda y: pp.greedy(pp.top_k(pp.temperature(y, 0.5), 10)), x)
    assert report.fused["sample_chain"] == 1
    assert torch.equal(result, x.argmax(-1, keepdim=True))


def test_off_unless_asked_for():
    _, report, _ = lowered(huggingface, torch.randn(ROWS, VOCAB), enable=False)
    (record,) = (match for match in report.matches if match.rule == "sample_chain")
    assert record.status == "disabled" and "opt-in" in record.reason


NEAR = {
    "two samples": (lambda x: torch.multinomial(x.softmax(-1), 2), "2 samples a row"),
    "squared probabilities": (lambda x: torch.multinomial(x.softmax(-1) ** 2, 1), "is not temperature, top-k, top-p"),
    "noise after the softmax": (
        lambda x: torch.multinomial(x.softmax(-1) * torch.rand_like(x), 1),
        "computed from 2 values",
    ),
    "every 4th token of the softmax": (
        lambda x: torch.multinomial(torch.where(torch.arange(VOCAB) % 4 == 0, x.softmax(-1), 0.0), 1),
        "is not temperature, top-k, top-p",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_says_why(name):
    fn, reason = NEAR[name]
    _, report, _ = lowered(fn, torch.randn(ROWS, VOCAB))
    (record,) = (match for match in report.matches if match.rule == "sample_chain")
    assert record.status in ("skipped", "near_miss") and reason in record.reason


@pytest.mark.parametrize("fn", [lambda x: x.argmax(-1), lambda x: (x * 2).argmax(-1), lambda x: x.softmax(-1)])
def test_no_chain_no_record(fn):
    _, report, _ = lowered(fn, torch.randn(ROWS, VOCAB))
    assert not [match for match in report.matches if match.rule == "sample_chain"]
