"""Random logits chains: what the fused operation may draw is what plain torch keeps, and what is not fused says why."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowered import lowered, statuses

from gcu_compile import post_processing as pp
from gcu_compile.kernels.sampling import eager

SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SAMPLE = torch.ops.gcu.sample.default
INF = float("inf")


def ascending(x, p):
    """vLLM's top-p: sorted upwards, the tail is cut."""
    ordered, order = x.sort(dim=-1)
    cut = ordered.softmax(-1).cumsum(-1) <= 1 - p
    cut[:, -1] = False
    return x.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -INF)


def threshold(x, k):
    """top-k by the k-th of all sorted values."""
    return x.masked_fill(x < x.sort(dim=-1, descending=True).values[:, k - 1 : k], -INF)


# name -> (spellings, values); the operation applies them in this order
PARTS = {
    "temperature": ((lambda x, t: x / t, lambda x, t: x * (1 / t), pp.temperature), (0.7, 1.0, 1.6)),
    "min_p": ((pp.min_p,), (0.01, 0.2)),
    "top_k": ((pp.top_k, threshold), (1, 7, 40)),
    "top_p": ((pp.top_p, ascending), (0.4, 0.9)),
}


@st.composite
def chains(draw):
    """Choices that make one chain, each independent of the others."""
    names = draw(st.lists(st.sampled_from(list(PARTS)), unique=True, max_size=4))
    if draw(st.sampled_from([True, True, False])):
        names.sort(key=list(PARTS).index)  # else in an order that may not be the operation's
    return {
        "parts": [(name, *(draw(st.sampled_from(choice)) for choice in PARTS[name])) for name in names],
        "per_row": draw(st.sampled_from(["", "temperature", "top_p"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        "shape": draw(st.sampled_from([(3, 101), (1, 64), (4, 257)])),
        "mask": draw(st.sampled_from(["", "", "fill", "where", "late"])),
        "between": draw(st.sampled_from(["", "", "view", "copy", "cast"])),
        "in_place": draw(st.booleans()),
        "extra_user": draw(st.booleans()),
        "last": draw(st.sampled_from(["", "", "", "noise", "squared"])),
        "symbolic": draw(st.booleans()),
    }


def probabilities(case):
    """The chain of a case, [rows, vocabulary] -> float32 probabilities."""

    def fn(logits, mask, row):
        x = logits.float()
        if case["mask"] == "fill":
            x = x.clone().masked_fill_(mask, -INF) if case["in_place"] else x.masked_fill(mask, -INF)
        if case["mask"] == "where":
            x = torch.where(~mask, x, -INF)
        for name, spelled, value in case["parts"]:
            x = spelled(x, row if name == case["per_row"] else value)
        x = {
            "": lambda: x,
            "view": lambda: x.unsqueeze(0).squeeze(0),
            "copy": x.clone,
            "cast": lambda: x.double().float(),
        }[case["between"]]()
        out = x.softmax(-1)
        if case["mask"] == "late":  # no setting means that, unless one token is left
            out = out.masked_fill(mask, 0.0)
        if case["last"] == "squared":  # to the draw it is half the temperature
            out = out * out
        return out * torch.rand_like(out).clamp(0.5) if case["last"] == "noise" else out

    return fn


class Seen(torch.fx.Interpreter):
    """Runs a graph and keeps what the operation is called with."""

    def call_function(self, target, args, kwargs):
        if target is SAMPLE:
            names = [argument.name for argument in SAMPLE._schema.arguments]
            self.asked = dict(zip(names, args, strict=False)) | kwargs
        return super().call_function(target, args, kwargs)


def data(case):
    """Logits without equal values in a row, so that no threshold leaves anything to chance."""
    rows, vocab = case["shape"]
    values = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[(values > 1e-3) & (values < 8)]
    values = torch.cat([-values, values]).to(case["dtype"])
    x = torch.stack([values[torch.randperm(len(values))[:vocab]] for _ in range(rows)])
    mask = torch.rand(rows, vocab) > 0.7
    mask[:, 0] = False
    return x, mask, torch.rand(rows, 1) * 0.8 + 0.1


def held(case, fired):
    """Lower one case, and hold what its operation keeps against plain torch."""
    torch.manual_seed(0)
    fn, args = probabilities(case), data(case)

    def step(*args):
        out = fn(*args)
        ids = torch.multinomial(out, 1)
        return (ids, out.amax(-1)) if case["extra_user"] else ids

    symbolic = case["symbolic"] and case["shape"][0] > 1
    gm, report = lowered(step, *args, symbolic=symbolic, dims=(0,), enable_rules=["sample_chain"])
    ((status, reason),) = statuses(report, "sample_chain")
    fired[status] += 1
    if status != "fused":
        assert reason, "not fused, and no reason is given"
        return
    assert case["last"] != "noise", "noise of the graph's own is lost"
    seen = Seen(gm)
    seen.run(*args)
    asked = {name: seen.asked.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
    kept, weights = eager.kept_set(eager.adjusted(seen.asked["logits"], seen.asked.get("forbidden")), **asked)
    expected = fn(*args)
    mass = torch.where(kept, weights, 0.0)
    expected, found = (one / one.sum(-1, keepdim=True) for one in (expected, mass))
    told = (found > 1e-30) | (expected > 0)  # float32 has no smaller probabilities
    assert torch.equal(kept & told, expected > 0), case
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_chains(examples):
    fired: Counter = Counter()

    @settings(SETTINGS, max_examples=examples)
    @given(chains())
    def run(case):
        held(case, fired)

    run()
    assert fired["fused"] >= 3 and fired.total() - fired["fused"] >= 3, fired
