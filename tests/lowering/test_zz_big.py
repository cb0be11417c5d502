"""Random graphs around every pattern: the result is always that of float64 eager, and what is not fused says why."""

import math

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowered import check, statuses

SETTINGS = settings(
    max_examples=150,
    deadline=None,

    suppress_health_check=list(HealthCheck),
)
MASKS = ("none", "causal", "window", "padding", "bias", "alibi", "finite")


@st.composite
def attentions(draw):
    """Choices that make one attention, each independent of the others."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "batch": draw(st.sampled_from([1, 2, 3])),
        "kv_heads": kv_heads,
        "queries": draw(st.sampled_from([1, 2, 5, 9])),
        "past": draw(st.sampled_from([0, 0, 3])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "mask": draw(st.sampled_from(MASKS)),
        "cap": draw(st.booleans()),
        "spelling": draw(st.sampled_from(["sdpa", "math", "folded", "in place"])),
        "extra_user": draw(st.sampled_from(["", "scores", "weights"])),
        "cast": draw(st.booleans()),
        "view": draw(st.booleans()),
        "symbolic": draw(st.booleans()),
    }


def mask_of(kind, q, k, past, padding):
    i, j = torch.arange(q.shape[2])[:, None] + past, torch.arange(k.shape[2])[None]
    low = torch.finfo(torch.bfloat16).min if kind == "finite" else -math.inf
    if kind in ("causal", "finite"):
        return torch.where(j <= i, 0.0, low)
    if kind == "window":
        return torch.where((j <= i) & (i - j < 3), 0.0, low)
    if kind == "padding":
        return torch.where(padding[:, None, None, : k.shape[2]], 0.0, low)
    if kind == "alibi":
        slopes = torch.full((4,), 0.5).pow(torch.arange(1, 5)).view(4, 1, 1)
        return slopes * (j - i).float() + torch.where(j <= i, 0.0, low)
    if kind == "bias":
        return torch.sin(i * 1.5 + j)
    return None


def function(case):
    def fn(q, k, v, padding):
        n, past = 4 // k.shape[1], case["past"]
        mask = mask_of(case["mask"], q, k, past, padding)
        mask = None if mask is None else mask.to(q.dtype)
        if n > 1:
            k, v = (x[:, :, None].expand(-1, -1, n, -1, -1).reshape(x.shape[0], 4, *x.shape[2:]) for x in (k, v))
        if case["spelling"] == "sdpa" and not case["cap"]:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if case["spelling"] == "folded":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(*q.shape[:3], -1) * 0.25
        else:
            scores = (q @ k.mT) / 4.0
        if case["cap"]:
            scores = torch.tanh(scores / 3.0) * 3.0
        if case["view"]:
            scores = scores.unsqueeze(0).squeeze(0).clone()
        if mask is not None:
            scores = scores.add_(mask) if case["spelling"] == "in place" else scores + mask
        weights = scores.softmax(-1, dtype=torch.float32 if q.dtype == torch.bfloat16 else q.dtype)
        weights = weights.double().to(q.dtype) if case["cast"] else weights.to(q.dtype)
        out = weights @ v
        if case["extra_user"]:
            used = scores.tanh() if case["extra_user"] == "scores" else weights
            out = out + used.mean(-1, keepdim=True).nan_to_num(neginf=0.0)
        return out

    return fn


@SETTINGS
@given(attentions())
def test_attention(case):
    torch.manual_seed(0)
    keys = case["queries"] + case["past"]
    q = torch.randn(case["batch"], 4, case["queries"], 16, dtype=case["dtype"])
    k, v = torch.randn(2, case["batch"], case["kv_heads"], keys, 16, dtype=case["dtype"])
    padding = torch.rand(case["batch"], 16) > 0.4
    padding[0, :keys] = False  # a sequence that sees no key
    symbolic = case["symbolic"] and min(case["batch"], case["queries"]) > 1
    gm, report = check(function(case), q, k, v, padding, symbolic=symbolic)
    found = statuses(report, "attention")
    if keys == 1 and not found:
        return  # one query and one key: Inductor's table makes a sum of the product, and no attention is left
    assert len(found) == 1
    assert found[0][0] == "fused" or found[0][1], "not fused, and no reason is given"


@st.composite
def chains(draw):
    """Elementwise chains around a norm, a gate and a rotation."""
    return {
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "square": draw(st.sampled_from(["pow", "mul"])),
        "root": draw(st.sampled_from(["rsqrt", "sqrt", "power"])),
        "dim": draw(st.sampled_from([-1, -1, -1, -2])),
        "extra_user": draw(st.booleans()),
        "view": draw(st.booleans()),
        "in_place": draw(st.booleans()),
        "shape": draw(st.sampled_from([(1, 1, 8), (2, 3, 8), (3, 5, 32)])),
    }


@SETTINGS
@given(chains())
def test_norm_and_gate(case):
    def fn(x, w):
        y = x.float() if x.dtype == torch.bfloat16 else x  # as every model does
        mean = (y.pow(2) if case["square"] == "pow" else y * y).mean(case["dim"], keepdim=True)
        root = {"rsqrt": torch.rsqrt, "sqrt": lambda v: 1 / v.sqrt(), "power": lambda v: v**-0.5}[case["root"]]
        factor = root(mean + 1e-3)
        out = (y.mul(factor).mul_(1.0) if case["in_place"] else y * factor).to(x.dtype) * w
        out = out.view(-1, x.shape[-1]).view(x.shape) if case["view"] else out
        gate, up = out.chunk(2, -1)
        out = F.silu(gate) * up
        return out + mean.to(x.dtype).mean() if case["extra_user"] else out

    torch.manual_seed(0)
    x, w = torch.randn(case["shape"], dtype=case["dtype"]), torch.rand(case["shape"][-1], dtype=case["dtype"])
    _, report = check(fn, x, w)
    found = statuses(report, "rms_norm")
    assert report.fused["rms_norm"] == (case["dim"] == -1), found
    assert report.fused["gated_activation"] == 1
