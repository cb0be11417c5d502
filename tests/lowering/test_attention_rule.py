"""Every spelling of attention becomes `gcu::attention` with the mask that was meant, and keeps its meaning."""

import math

import pytest
import torch
import torch.nn.functional as F
from lowered import ATTENTION, calls, check, lowered, statuses

DTYPES = [torch.float32, torch.bfloat16]


def qkv(heads=4, kv_heads=4, queries=7, keys=7, size=16, v_size=16, batch=2, dtype=torch.float32):
    torch.manual_seed(0)
    return (
        torch.randn(batch, heads, queries, size, dtype=dtype),
        torch.randn(batch, kv_heads, keys, size, dtype=dtype),
        torch.randn(batch, kv_heads, keys, v_size, dtype=dtype),
    )


def repeat_kv(x, n):
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def index(q, k):
    return torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]


def attend(q, k, v, change=lambda scores: scores, scale=0.25):
    """As the models of transformers spell it, softmax in float32 at least."""
    scores = change(q @ k.transpose(-1, -2) * scale)
    weights = F.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights, 0.1, training=False) @ v


def masked(rule, low=-math.inf):
    def change(scores):
        keep = rule(*index(scores, scores.transpose(-1, -2)))
        return scores.masked_fill(~keep, low)

    return change


def added(rule, low):
    def change(scores):
        keep = rule(*index(scores, scores.transpose(-1, -2)))
        return scores + torch.where(keep, 0.0, low).to(scores.dtype)

    return change


CAUSAL, WINDOW = (lambda i, j: j <= i), (lambda i, j: (j <= i) & (j > i - 3))
# name -> (function, named arguments of gcu::attention that it must become)
SPELLINGS = {
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), {"scale": 0.25, "causal": False}),
    "sdpa causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        {"scale": 0.3, "causal": True, "causal_offset": 0},
    ),
    "sdpa bool mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL(*index(q, k))),
        {"causal": True, "causal_offset": 0},
    ),
    "sdpa tril": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        ),
        {"causal": True, "causal_offset": 0},
    ),
    "softmax": (attend, {"scale": 0.25, "causal": False}),
    "masked_fill": (lambda q, k, v: attend(q, k, v, masked(CAUSAL)), {"causal": True}),
    "masked_fill window": (lambda q, k, v: attend(q, k, v, masked(WINDOW)), {"causal": True, "window": 3}),
    "added finfo.min": (
        lambda q, k, v: attend(q, k, v, added(CAUSAL, torch.finfo(torch.bfloat16).min)),
        {"causal": True, "causal_offset": 0},
    ),
    "added triu": (
        lambda q, k, v: attend(
            q, k, v, lambda s: s + torch.full((s.shape[-2], s.shape[-1]), -math.inf, dtype=s.dtype).triu(1)
        ),
        {"causal": True, "causal_offset": 0},
    ),
    "soft cap": (
        lambda q, k, v: attend(q, k, v, lambda s: torch.tanh(s / 5.0) * 5.0),
        {"soft_cap": 5.0, "causal": False},
    ),
    "soft cap and window": (
        lambda q, k, v: attend(q, k, v, lambda s: masked(WINDOW)(5.0 * torch.tanh(s * 0.2))),
        {"soft_cap": 5.0, "causal": True, "window": 3},
    ),
    "alibi": (
        lambda q, k, v: attend(q, k, v, lambda s: masked(CAUSAL)(s + (slopes(s) * distance(s)).to(s.dtype))),
        {"causal": True},
    ),
    "einsum": (
        lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) / 4).softmax(-1), v),
        {"scale": 0.25},
    ),
    "baddbmm": (
        lambda q, k, v: torch.baddbmm(
            q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.25
        ).view(*q.shape[:3], -1).softmax(-1)
        @ v,
        {"scale": 0.25},
    ),
    "scaled operands": (
        lambda q, k, v: attend(q * 0.5, k, v, scale=0.5),
        {"scale": 0.25},
    ),
}


def slopes(scores):
    return torch.full((4,), 0.5).pow(torch.arange(1, 5)).view(1, 4, 1, 1)


def distance(scores):
    i, j = index(scores, scores.transpose(-1, -2))
    return (j - i).float()


def is_fused(gm, report, expected=None):
    assert report.fused["attention"] == 1, statuses(report, "attention")
    (node,) = calls(gm, ATTENTION)
    for name, value in (expected or {}).items():
        assert node.kwargs[name] == pytest.approx(value), name
    return node


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name, dtype, symbolic):
    if symbolic and name == "baddbmm":
        pytest.skip("torch's own fake baddbmm does not take a symbolic batch")
    fn, expected = SPELLINGS[name]
    gm, report = check(fn, *qkv(dtype=dtype), symbolic=symbolic)
    node = is_fused(gm, report, expected)
    assert node.args[3] is None, "the mask is passed as a bias"
    assert (node.args[4] is not None) == (name == "alibi")
    assert not calls(gm, torch.ops.aten.bmm.default)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 7, 7), (3, 4, 1, 1), (2, 4, 33, 33)])
def test_extreme_shapes(name, shape):
    batch, heads, queries, keys = shape
    gm, report = check(SPELLINGS[name][0], *qkv(heads, heads, queries, keys, batch=batch))
    if queries > 1:
        is_fused(gm, report)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spelling", ["repeat_kv", "repeat_interleave", "enable_gqa", "expand"])
def test_repeated_heads_are_not_repeated(spelling, kv_heads, batch):
    def fn(q, k, v):
        n = q.shape[1] // k.shape[1]
        if spelling == "enable_gqa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if spelling == "expand" and k.shape[1] == 1:
            k, v = (x.expand(-1, n, -1, -1) for x in (k, v))
        elif spelling == "repeat_interleave":
            k, v = (x.repeat_interleave(n, dim=1) for x in (k, v))
        else:
            k, v = (repeat_kv(x, n) for x in (k, v))
        return attend(q, k, v)

    gm, report = check(fn, *qkv(kv_heads=kv_heads, batch=batch))
    node = is_fused(gm, report)
    assert [node.args[i].meta["val"].shape[1] for i in (0, 1, 2)] == [4, kv_heads, kv_heads]


def test_heads_that_alternate_are_not_groups():
    gm, report = check(lambda q, k, v: attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), *qkv(kv_heads=2))
    assert is_fused(gm, report).args[1].meta["val"].shape[1] == 4


def grouped(q, k, v, change=lambda scores: scores, sdpa=False, innermost=True):
    """Queries as [batch, kv_heads, group, ...] against one key head of each group, or with the two exchanged."""
    (batch, heads, length, size), kv_heads = q.shape, k.shape[1]
    shape = (kv_heads, heads // kv_heads) if innermost else (heads // kv_heads, kv_heads)
    q, k, v = q.view(batch, *shape, length, size), *(x.unsqueeze(2 if innermost else 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True) if sdpa else attend(q, k, v, change)
    return out.reshape(batch, heads, length, v.shape[-1])


def alibi_of_groups(scores):
    """One slope of each head, [kv_heads, group, 1, 1], times the distance."""
    kv_heads, group = scores.shape[1:3]
    slopes = torch.full((kv_heads * group,), 0.5).pow(torch.arange(1, kv_heads * group + 1))
    return scores + (slopes.view(kv_heads, group, 1, 1) * distance(scores)).to(scores.dtype)


def waves_of_groups(scores):
    """A bias of its own for every head, query and key."""
    places = torch.arange(scores[0].numel(), dtype=torch.float32).view(scores.shape[1:])
    return scores + torch.sin(places * 1.5).to(scores.dtype)


GROUPED = {
    "alibi": (lambda q, k, v: grouped(q, k, v, lambda s: masked(CAUSAL)(alibi_of_groups(s))), {"causal": True}),
    "plain": (grouped, {"causal": False}),
    "window": (lambda q, k, v: grouped(q, k, v, masked(WINDOW)), {"causal": True, "window": 3}),
    "soft cap": (lambda q, k, v: grouped(q, k, v, lambda s: 5 * torch.tanh(s / 5)), {"soft_cap": 5.0}),
    "sdpa": (lambda q, k, v: grouped(q, k, v, sdpa=True), {"causal": True}),
}


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GROUPED)
def test_groups_in_a_dimension_of_their_own(name, dtype, symbolic):
    fn, expected = GROUPED[name]
    gm, report = check(fn, *qkv(6, 2, v_size=8, dtype=dtype), symbolic=symbolic)
    node = is_fused(gm, report, expected)
    assert [node.args[i].meta["val"].shape[1] for i in (0, 1, 2)] == [6, 2, 2] and node.args[3] is None
    assert (node.args[4] is not None) == (name == "alibi")


@pytest.mark.parametrize("heads, kv_heads, batch", [(4, 1, 2), (4, 4, 2), (4, 2, 1), (4, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_extreme_shapes(name, heads, kv_heads, batch):
    gm, report = check(GROUPED[name][0], *qkv(heads, kv_heads, batch=batch))
    is_fused(gm, report)


@pytest.mark.parametrize("symbolic", [False, True])
def test_groups_of_five_dimensional_inputs_with_padding(symbolic):
    q, k, v = qkv(6, 2)
    keep = torch.rand(2, 1, 1, 1, 7) > 0.3
    keep[..., 0] = True
    fn = lambda q, k, v, m: attend(q, k, v, lambda s: s.masked_fill(~m, -math.inf))  # noqa: E731
    inputs = q.view(2, 2, 3, 7, 16), k.unsqueeze(2), v.unsqueeze(2), keep
    gm, report = check(fn, *inputs, symbolic=symbolic, dims=(0,))
    node = is_fused(gm, report)
    assert [node.args[i].meta["val"].shape[1] for i in (0, 1, 3)] == [6, 2, 1]


@pytest.mark.parametrize("innermost", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_bias_of_each_head_in_groups(batch, innermost):
    for change in (alibi_of_groups, waves_of_groups):
        fn = lambda q, k, v, change=change: grouped(q, k, v, change, innermost=innermost)  # noqa: E731
        node = is_fused(*check(fn, *qkv(6, 2, batch=batch)))
        if batch > 1:  # one sequence is read as a batch of groups, to which ALiBi is a bias like any other
            assert (node.args[3] is None) == (change is alibi_of_groups)
    bias = torch.randn(batch, 2, 3, 7, 7)
    gm, report = check(lambda q, k, v, m: grouped(q, k, v, lambda s: s + m), *qkv(6, 2, batch=batch), bias)
    assert is_fused(gm, report).args[3].meta["val"].shape == ((2, 6, 7, 7) if batch > 1 else (2, 3, 7, 7))


def test_near_misses_of_groups():
    exchanged = lambda q, k, v: grouped(q, k, v, innermost=False)  # noqa: E731
    gm, report = check(exchanged, *qkv(6, 2))  # heads alternate: no groups, each has its own keys
    assert is_fused(gm, report).args[1].meta["val"].shape[1] == 6
    bias = torch.randn(1, 2, 1, 7, 7)
    gm, report = check(lambda q, k, v, m: grouped(q, k, v, lambda s: s + m), *qkv(6, 2), bias)
    assert not calls(gm, ATTENTION) and "differs between groups" in statuses(report, "attention")[0][1]
    gm, report = check(lambda q, k, v: grouped(q, k, v, lambda s: s.mT), *qkv(6, 2))
    assert not calls(gm, ATTENTION)


@pytest.mark.parametrize("symbolic", [False, True])
def test_keys_ahead_of_queries(symbolic):
    def decode(q, k, v, past_k, past_v):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        past = past_k.shape[2]
        return attend(q, k, v, masked(lambda i, j: j <= i + past))

    past = qkv(keys=5)[1:]
    gm, report = check(decode, *qkv(queries=3, keys=3), *past, symbolic=symbolic)
    node = is_fused(gm, report)
    offset = node.kwargs["causal_offset"]
    assert offset == 5 if not symbolic else offset.meta["val"] is not None
    assert node.kwargs["causal"] and node.args[3] is None


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [2.0, 0.3, -2.0, 0.0])
def test_a_soft_cap_that_is_known_at_run_time(number, dtype, symbolic):
    """As Dynamo passes a model's number under dynamic=True: a tensor [] in float64, cast at each use."""

    def fn(q, k, v, cap):
        one, other = cap.double().float(), cap.double().to(torch.float32)
        return attend(q, k, v, lambda s: masked(CAUSAL)((torch.tanh(s / one) * other).to(s.dtype)))

    gm, report = check(fn, *qkv(dtype=dtype), torch.tensor(number, dtype=torch.float64), symbolic=symbolic)
    node = is_fused(gm, report, {"causal": True})
    assert node.kwargs["soft_cap_tensor"].meta["val"].dtype == torch.float32 and "soft_cap" not in node.kwargs


def test_near_misses_of_a_soft_cap_that_is_known_at_run_time():
    caps = torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    two = lambda q, k, v, a, b: attend(q, k, v, lambda s: torch.tanh(s / a) * b)  # noqa: E731
    rounded = lambda q, k, v, a: attend(q, k, v, lambda s: torch.tanh(s / a.bfloat16()) * a.half())  # noqa: E731
    for fn, given in ((two, caps), (rounded, caps[:1])):
        gm, report = check(fn, *qkv(), *given)
        assert not calls(gm, ATTENTION) and "tanh" in statuses(report, "attention")[0][1]


def test_a_mask_that_is_an_input_is_a_bias():
    bias = torch.randn(1, 4, 7, 7)
    keep = torch.rand(2, 1, 7, 7) > 0.3
    keep[..., 0] = True
    gm, report = check(lambda q, k, v, m: attend(q, k, v, lambda s: s + m), *qkv(), bias)
    assert is_fused(gm, report).args[3] is not None
    gm, report = check(lambda q, k, v, m: attend(q, k, v, lambda s: s.masked_fill(~m, -math.inf)), *qkv(), keep)
    assert is_fused(gm, report).args[3].meta["val"].dtype == torch.bool
    sdpa = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m)  # noqa: E731
    for mask in (keep, bias):
        gm, report = check(sdpa, *qkv(), mask)
        assert is_fused(gm, report).args[3] is not None


@pytest.mark.parametrize("kind", ["bool", "float", "causal too"])
def test_a_query_without_keys_is_nan_where_the_model_says_so(kind):
    keep = torch.rand(2, 1, 7, 7) > 0.5
    keep[:, :, 3] = False

    def fn(q, k, v, m):
        def change(scores):
            if kind == "float":
                return scores + torch.where(m, 0.0, -math.inf).to(scores.dtype)
            scores = scores.masked_fill(~m, -math.inf)
            return masked(CAUSAL)(scores) if kind == "causal too" else scores

        return attend(q, k, v, change)

    gm, report = check(fn, *qkv(), keep)
    is_fused(gm, report)
    assert gm(*qkv(), keep)[:, :, 3].isnan().all()
    gm, report = check(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), *qkv(), keep)
    assert not gm(*qkv(), keep).isnan().any()


def test_folded_batches_and_three_dimensions():
    q, k, v = (x.flatten(0, 1) for x in qkv())
    gm, report = check(lambda q, k, v: attend(q, k, v), q, k, v)
    is_fused(gm, report)
    gm, report = check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v)
    is_fused(gm, report)


def test_widened_operands_are_read_narrow():
    def fn(q, k, v):
        return ((q.float() @ k.float().mT) * 0.25).softmax(-1).to(v.dtype) @ v

    gm, report = lowered(fn, *qkv(dtype=torch.bfloat16))
    assert is_fused(gm, report).args[0].meta["val"].dtype == torch.bfloat16


REFUSED = {
    "other dim": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, None),
    "no product": (lambda q, k, v: q[..., :7].softmax(-1) @ v, "no product"),
    "tensor scale": (
        lambda q, k, v: attend(q, k, v, lambda s: s * torch.arange(7.0).to(s.dtype)),
        "multiplied by a tensor",
    ),
    "scaled mask": (
        lambda q, k, v: attend(q, k, v, lambda s: (s + torch.arange(7.0)) * 2.0),
        "scaled or capped after a mask",
    ),
    "finite fill": (
        lambda q, k, v: attend(q, k, v, lambda s: s.masked_fill(q[..., :1] > 0, -5.0)),
        "masked become -5",
    ),
    "cap of another": (
        lambda q, k, v: attend(q, k, v, lambda s: torch.tanh(s / 5.0) * 4.0),
        "tanh",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_say_why(name):
    fn, reason = REFUSED[name]
    gm, report = check(fn, *qkv(), length=512, scale=64.0)
    found = [s for s in statuses(report, "attention") if s[0] != "fused"]
    if reason is None:
        assert all(status != "near_miss" for status, _ in found)
    else:
        assert found and reason in found[0][1] and not calls(gm, ATTENTION)


def test_the_rule_can_be_switched_off():
    gm, report = check(SPELLINGS["sdpa"][0], *qkv(), disable_rules=["attention"])
    assert statuses(report, "attention") == [("disabled", "switched off by an option")] and not calls(gm, ATTENTION)
