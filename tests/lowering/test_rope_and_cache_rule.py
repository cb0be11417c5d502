"""Rule `rope_and_cache`: rotation and write around an attention that the graph does not see into."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowered import calls, lowered, statuses

from gcu_compile.kernels.attention import rope
from gcu_compile.lowering.rules import rope_and_cache as rule

HEADS, KV_HEADS, SIZE, ROWS, BLOCKS, BLOCK = 6, 2, 16, 32, 3, 16
ON = {"enable_rules": "rope_and_cache"}
CACHES: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
LIBRARY = torch.library.Library("cached", "FRAGMENT")
LIBRARY.define("write(Tensor k, Tensor v, str layer) -> Tensor")
LIBRARY.define(
    "fused(Tensor qkv, Tensor cos_sin, Tensor? positions, Tensor? q_norm, Tensor? k_norm, int heads, int head_dim, "
    "bool interleaved, float eps, str layer) -> (Tensor, Tensor)"
)


def write(k, v, layer):
    """Token t goes to slot t."""
    for cache, x in zip(CACHES[layer], (k, v), strict=True):
        rope.write(cache, x.to(cache.dtype), torch.arange(len(x)), None, None, None)
    return k.new_empty(0)


def fused(qkv, cos_sin, positions, q_norm, k_norm, heads, head_dim, interleaved, eps, layer):
    slots = torch.arange(len(qkv))
    q = torch.ops.gcu.rope_and_cache(qkv, cos_sin, positions, slots, *CACHES[layer], q_norm, k_norm,
                                     interleaved=interleaved, eps=eps)  # fmt: skip
    assert q.shape[1:] == (heads, head_dim)
    return q, qkv.new_empty(0)


LIBRARY.impl("write", write, "CPU")
LIBRARY.impl("fused", fused, "CPU")
LIBRARY._register_fake("write", lambda k, v, layer: k.new_empty(0))
LIBRARY._register_fake(
    "fused", lambda qkv, c, p, qn, kn, heads, size, *a: (qkv.new_empty(len(qkv), heads, size), qkv.new_empty(0))
)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """The engine's operations are known, and its caches empty."""
    monkeypatch.setitem(rule.known, torch.ops.cached.write.default, torch.ops.cached.fused.default)
    yield
    CACHES.clear()


def new_cache(dtype, v_dim=SIZE):
    CACHES["layer"] = tuple(torch.zeros(BLOCKS, KV_HEADS, BLOCK, size, dtype=dtype) for size in (SIZE, v_dim))
    return CACHES["layer"]


def norm(x, weight, eps=1e-5):
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def turn(x, cos, sin, rotary, interleaved):
    """As vLLM spells it."""
    part, rest = x[..., :rotary], x[..., rotary:]
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    one, two = (part[..., ::2], part[..., 1::2]) if interleaved else torch.chunk(part, 2, -1)
    first, second = one * cos - two * sin, two * cos + one * sin
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((turned, rest), -1)


# What may stand between the rotation and the write, or beside it: (of the written keys, of the result).
AROUND = {
    "nothing": (lambda k: k, lambda k: 0),
    "clone": (lambda k: k.clone(), lambda k: 0),
    "views": (lambda k: k.flatten(1).view(k.shape), lambda k: 0),
    "another user": (lambda k: k, lambda k: k.sum()),
    "scaled": (lambda k: k * 2, lambda k: 0),
    "in place": (lambda k: k.clone().mul_(0.5), lambda k: 0),
    "other dtype": (lambda k: k.double(), lambda k: 0),
}


def model(rotary=SIZE, interleaved=False, norms=False, v_dim=SIZE, rows=False, eps=(1e-5, 1e-5), around="nothing"):
    """An attention layer up to its opaque attention: q and what orders attention after the write."""
    before, beside = AROUND[around]

    def layer(qkv, table, positions, *weights):
        q, k, v = qkv.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * v_dim], -1)
        q, k = (x.view(len(qkv), n, SIZE) for x, n in ((q, HEADS), (k, KV_HEADS)))
        if norms:
            q, k = (norm(x, weight, e) for x, weight, e in zip((q, k), weights, eps, strict=True))
        cos, sin = (table if rows else table.index_select(0, positions)).chunk(2, -1)
        q, k = (turn(x, cos, sin, rotary, interleaved) for x in (q, k))
        k, v = before(k.reshape(len(qkv), KV_HEADS, SIZE)), v.view(len(qkv), KV_HEADS, v_dim)
        return q.reshape(len(qkv), HEADS * SIZE) + torch.ops.cached.write(k, v, "layer").sum() + beside(k)

    return layer


def inputs(dtype=torch.float32, tokens=9, rotary=SIZE, v_dim=SIZE, rows=False, seed=0):
    source = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=source).to(dtype)

    qkv = random(tokens, HEADS * SIZE + KV_HEADS * (SIZE + v_dim))
    positions = torch.randint(0, ROWS, (tokens,), generator=source)
    return qkv, random(tokens if rows else ROWS, rotary), positions, random(SIZE), random(SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "symbolic"), [(9, False), (1, False), (0, False), (9, True)])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"rotary": 8},
        {"interleaved": True},
        {"rotary": 8, "interleaved": True},
        {"norms": True},
        {"norms": True, "rotary": 8, "interleaved": True},
        {"v_dim": 24},
        {"rows": True},
    ],
    ids=str,
)
def test_rotation_and_write_are_one_call(kind, tokens, dtype, symbolic):
    args = inputs(dtype, tokens, **{name: kind[name] for name in kind if name in ("rotary", "v_dim", "rows")})
    made = new_cache(dtype, kind.get("v_dim", SIZE))
    fn = model(**kind)
    wide = [x.double() if x.is_floating_point() else x for x in args]
    gm, report = lowered(fn, *args, symbolic=symbolic, dims=(0,), **ON)
    assert report.fused["rope_and_cache"] == 1 and len(calls(gm, torch.ops.cached.fused.default)) == 1
    assert not calls(gm, torch.ops.cached.write.default) and not calls(gm, torch.ops.aten.cat.default)
    actual = gm(*args)
    exact = new_cache(torch.float64, kind.get("v_dim", SIZE))
    expected = fn(*wide)
    scale = max(1.0, float(expected.abs().max())) if tokens else 1.0
    limits = check_limits(dtype, scale)
    torch.testing.assert_close(actual.double(), expected, **limits)
    for got, want in zip(made, exact, strict=True):
        torch.testing.assert_close(got.double(), want, **limits)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {
            "rotary": st.sampled_from([4, 8, SIZE]),
            "interleaved": st.booleans(),
            "norms": st.booleans(),
            "v_dim": st.sampled_from([SIZE, 24]),
            "rows": st.booleans(),
        }
    ),
    st.sampled_from(list(AROUND)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 9),
    st.booleans(),
)
def test_random_graphs_around_it(kind, around, dtype, tokens, symbolic):
    """The result and the cache are always those of plain torch; where nothing is fused, the reason is given."""
    layer = model(**kind, around=around)
    args = inputs(dtype, tokens, kind["rotary"], kind["v_dim"], kind["rows"])
    made = new_cache(dtype, kind["v_dim"])
    gm, report = lowered(layer, *args, symbolic=symbolic and tokens > 1, dims=(0,), **ON)
    (place,) = statuses(report, "rope_and_cache")
    if around == "nothing" or place[0] == "fused":
        assert place[0] == "fused" and not calls(gm, torch.ops.cached.write.default)
    else:
        assert place[1]
    actual = gm(*args)
    exact = new_cache(torch.float64, kind["v_dim"])
    wide = [x.double() if x.is_floating_point() else x for x in args]
    expected = layer(*wide)
    # A sum of all keys, where one is added, is as large as it has terms.
    limits = check_limits(dtype, max(1.0, float(expected.abs().max())))
    torch.testing.assert_close(actual.double(), expected, **limits)
    for got, want in zip(made, exact, strict=True):
        torch.testing.assert_close(got.double(), want, **limits)


def check_limits(dtype, scale):
    from gcu_compile.kernels.tolerance import tolerance

    return tolerance(dtype, SIZE, scale)


def refused(fn, *args, **options):
    """The only place's status and reason; the result is that of the graph as it was."""
    new_cache(torch.float32)
    before = len(CACHES)
    _, report = check_untouched(fn, *args, **{**ON, **options})
    assert len(CACHES) == before
    (place,) = statuses(report, "rope_and_cache")
    return place


def check_untouched(fn, *args, **options):
    gm, report = lowered(fn, *args, **options)
    assert len(calls(gm, torch.ops.cached.write.default)) == 1
    torch.testing.assert_close(gm(*args), fn(*args))
    return gm, report


def test_it_is_opt_in_and_a_match_can_be_switched_off():
    assert refused(model(), *inputs(), enable_rules="")[0] == "disabled"
    assert refused(model(), *inputs(), disable_matches="rope_and_cache@0")[0] == "disabled"
    assert refused(model(), *inputs(), disable_rules="rope_and_cache")[0] == "disabled"


def test_a_write_of_keys_that_are_not_rotated_is_left():
    def plain(qkv, *rest):
        q, k, v = qkv.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], -1)
        token = torch.ops.cached.write(*(x.view(-1, KV_HEADS, SIZE) for x in (k, v)), "layer")
        return q * 2 + token.sum()

    assert refused(plain, *inputs())[0] == "skipped"


def variant(change):
    """`model()` with one thing changed."""

    def layer(qkv, table, positions, q_norm, k_norm):
        q, k, v = qkv.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], -1)
        q, k, v = (x.view(len(qkv), n, SIZE) for x, n in ((q, HEADS), (k, KV_HEADS), (v, KV_HEADS)))
        cos, sin = table.index_select(0, positions).chunk(2, -1)
        own = {"q": q, "k": k, "v": v, "q_cos": cos, "k_cos": cos, "q_sin": sin, "k_sin": sin, "more": 0}
        own |= change(own, q_norm, table, positions)
        q = turn(own["q"], own["q_cos"], own["q_sin"], SIZE, own.get("interleaved", False))
        k = turn(own["k"], own["k_cos"], own["k_sin"], SIZE, False)
        token = torch.ops.cached.write(k, own["v"], "layer")
        more = own["more"](k) if callable(own["more"]) else own["more"]
        return q.reshape(len(qkv), HEADS * SIZE) + token.sum() + more

    return layer


def turned_back(own, table, positions):
    return dict(zip(("q_cos", "q_sin"), table.index_select(0, positions.flip(0)).chunk(2, -1), strict=True))


HALVES = "cosines and sines are not the two halves"
COLUMNS = "what is rotated is not columns of a projection"
CHANGES = [
    (lambda own, w, t, p: {"more": lambda k: k.sum()}, "the rotated keys are used elsewhere too"),
    (lambda own, w, t, p: {"v": own["k"]}, "values are not the last columns"),
    (lambda own, w, t, p: {"v": own["v"] + 1}, "values are not the last columns"),
    (lambda own, w, t, p: {"interleaved": True}, "queries and keys are not turned alike"),
    (lambda own, w, t, p: {"q_cos": own["q_sin"]}, HALVES),
    (lambda own, w, t, p: {"k_cos": own["k_sin"], "k_sin": own["k_cos"]}, HALVES),
    (lambda own, w, t, p: turned_back(own, t, p), "queries and keys are not turned alike"),
    (lambda own, w, t, p: {"q": own["q"] * 2}, COLUMNS),
    (lambda own, w, t, p: {"k": own["k"] + 1}, COLUMNS),
    (lambda own, w, t, p: {"q": torch.nn.functional.layer_norm(own["q"], (SIZE,))}, "nor their norm"),
    (lambda own, w, t, p: {"q": norm(own["q"].flatten(1), w.repeat(HEADS)).view_as(own["q"])}, "no rotated queries"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=range(len(CHANGES)))
def test_near_misses_give_their_reason(change, reason):
    status, told = refused(variant(change), *inputs())
    assert status == "near_miss" and reason in told


def test_norms_of_different_epsilons_are_left():
    status, told = refused(model(norms=True, eps=(1e-5, 1e-6)), *inputs())
    assert status == "near_miss" and "different epsilons" in told


def test_float64_has_no_kernel_and_is_left():
    new_cache(torch.float64)
    args = [x.double() if x.is_floating_point() else x for x in inputs()]
    _, report = check_untouched(model(), *args, **ON)
    assert statuses(report, "rope_and_cache") == [("skipped", "the projection is torch.float64, which no kernel takes")]


def test_the_report_tells_what_was_joined():
    new_cache(torch.float32)
    _, report = lowered(model(rotary=8, interleaved=True, norms=True), *inputs(rotary=8), **ON)
    assert statuses(report, "rope_and_cache") == [("fused", "norm of q, norm of k, interleaved, 8 of 16")]
    assert report.fused["rotary"] == 0


def test_one_of_many_layers_does_not_hide_the_others():
    """The whole of a model in one graph: each write finds its own queries."""
    CACHES["layer"] = new_cache(torch.float32)

    def two(qkv, table, positions, q_norm, k_norm):
        first = model()(qkv, table, positions)
        again = torch.cat([first, qkv[:, HEADS * SIZE :]], -1)
        return model(norms=True)(again, table, positions, q_norm, k_norm)

    gm, report = lowered(two, *inputs(), **ON)
    assert report.fused["rope_and_cache"] == 2
    torch.testing.assert_close(gm(*inputs()), two(*inputs()))
