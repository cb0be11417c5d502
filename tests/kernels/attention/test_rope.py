"""`gcu::rope_and_cache`: its meaning against transformers' rotary embedding, its writes, and bad arguments by name."""

import pytest
import torch
from covering import pairwise

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import rope, write
from gcu_compile.kernels.host import build
from gcu_compile.kernels.tolerance import tolerance

TOKENS, HEADS, KV_HEADS, HEAD_DIM, BLOCKS, BLOCK_SIZE = 9, 6, 2, 32, 4, 16


def inputs(dtype=torch.float64, cache=None, rotary=HEAD_DIM, v_dim=HEAD_DIM, seed=0):
    """Arguments of rope_and_cache; token 4 is padding, slots are shuffled."""
    source = torch.Generator().manual_seed(seed)
    angles = torch.outer(torch.arange(64.0), 10000.0 ** -(torch.arange(0, rotary, 2) / max(rotary, 1))).double()
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=source)[:TOKENS]
    slots[4] = -1
    size = HEADS * HEAD_DIM + KV_HEADS * (HEAD_DIM + v_dim)
    return {
        "qkv": torch.randn(TOKENS, size, generator=source, dtype=torch.float64).to(dtype),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], -1).to(dtype),
        "positions": torch.randint(0, 64, (TOKENS,), generator=source),
        "slot_mapping": slots,
        "k_cache": torch.zeros(BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=cache or dtype),
        "v_cache": torch.zeros(BLOCKS, KV_HEADS, BLOCK_SIZE, v_dim, dtype=cache or dtype),
    }


def written(cache, slots):
    """[tokens, kv_heads, ...] of a cache at the slots that are not -1."""
    keep = slots[slots >= 0]
    return cache[keep // BLOCK_SIZE, :, keep % BLOCK_SIZE]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [HEAD_DIM, 12])
def test_meaning_is_transformers(interleaved, rotary):
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    a = inputs(rotary=rotary, v_dim=20)
    q = torch.ops.gcu.rope_and_cache(**a, interleaved=interleaved)
    q0, k0, v0 = a["qkv"].split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * 20], 1)
    q0, k0, v0 = (x.view(TOKENS, -1, n) for x, n in ((q0, HEAD_DIM), (k0, HEAD_DIM), (v0, 20)))
    cos, sin = a["cos_sin"][a["positions"]].chunk(2, -1)
    if interleaved:
        turn = [gptj(x[None, ..., :rotary], sin[None], cos[None])[0] for x in (q0, k0)]
    else:
        twice = [torch.cat([x, x], -1)[None] for x in (cos, sin)]
        turn = [x[0].transpose(0, 1) for x in llama(*(x[..., :rotary].transpose(0, 1)[None] for x in (q0, k0)), *twice)]
    q1, k1 = (torch.cat([t, x[..., rotary:]], -1) for t, x in zip(turn, (q0, k0), strict=True))
    torch.testing.assert_close(q, q1, **tolerance(torch.float64, 2))
    keep = a["slot_mapping"] >= 0
    torch.testing.assert_close(written(a["k_cache"], a["slot_mapping"]), k1[keep], **tolerance(torch.float64, 2))
    assert torch.equal(written(a["v_cache"], a["slot_mapping"]), v0[keep])
    assert (a["v_cache"] != 0).sum() == v0[keep].numel()  # nothing else was touched


def test_norms_and_rows_per_token():
    a = inputs()
    weights = torch.rand(2, HEAD_DIM).double() + 0.5
    by_position = rope.eager(**a, q_norm=weights[0], k_norm=weights[1], eps=1e-5)
    a["cos_sin"], a["positions"] = a["cos_sin"][a["positions"]], None
    assert torch.equal(rope.eager(**a, q_norm=weights[0], k_norm=weights[1], eps=1e-5), by_position)
    q = a["qkv"][:, : HEADS * HEAD_DIM].view(TOKENS, HEADS, HEAD_DIM)
    normed = torch.nn.functional.rms_norm(q, (HEAD_DIM,), weights[0], 1e-5)
    cos, sin = a["cos_sin"].chunk(2, -1)
    torch.testing.assert_close(by_position, rope.rotate(normed, cos, sin, False), **tolerance(torch.float64, HEAD_DIM))


@pytest.mark.parametrize("kind", ["tensor", "head", "zero", "token_head"])
def test_int8_writes_are_within_half_a_step(kind):
    plain, a = inputs(), inputs(cache=torch.int8)
    rope.eager(**plain)
    rows = {"tensor": (1,), "head": (KV_HEADS,), "zero": (KV_HEADS,)}.get(kind)
    point = torch.zeros(1)
    if kind == "token_head":
        a |= {f"{n}_scale_cache": torch.zeros(BLOCKS, KV_HEADS, BLOCK_SIZE) for n in "kv"}
    else:
        a |= {f"{n}_scale": torch.full(rows, 0.05) for n in "kv"}
        if kind == "zero":
            point = torch.tensor([3, -5], dtype=torch.int32)
            a |= {f"{n}_zero_point": point for n in "kv"}
    torch.ops.gcu.rope_and_cache(**a)
    for n in "kv":
        slots = a["slot_mapping"]
        exact = written(plain[f"{n}_cache"], slots)
        scale = written(a[f"{n}_scale_cache"], slots).unsqueeze(-1) if kind == "token_head" else torch.tensor(0.05)
        back = (written(a[f"{n}_cache"], slots).double() - point.view(1, -1, 1)) * scale.double()
        assert ((back - exact).abs() <= scale * 0.5001).all()


HOST = pairwise(
    {
        "isa": build.available(),
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "cache": ["float", "tensor", "head", "zero", "token_head"],
        "rotary": [HEAD_DIM, 12, 0],
        "v_dim": [HEAD_DIM, 20],
        "interleaved": [False, True],
        "norms": [False, True],
        "rows": [False, True],
    }
)


@pytest.mark.parametrize("row", HOST, ids=lambda row: "-".join(map(str, row.values())).replace("torch.", ""))
def test_host_covering_array(row, monkeypatch):
    """The C++ kernel against the meaning in float64; int8 within half a step and what the norm's rounding moves."""
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", row["isa"])
    dtype, kind = row["dtype"], row["cache"]
    a = inputs(dtype, None if kind == "float" else torch.int8, row["rotary"], row["v_dim"])
    if row["rows"]:
        a["cos_sin"], a["positions"] = a["cos_sin"][a["positions"]], None
    if row["norms"]:
        a |= {f"{n}_norm": torch.rand(HEAD_DIM, generator=torch.Generator().manual_seed(4)) + 0.5 for n in "qk"}
    wide = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in a.items()}
    wide |= {f"{n}_cache": wide[f"{n}_cache"].double() for n in "kv"}
    points = torch.tensor([3, -5], dtype=torch.int32)
    if kind == "token_head":
        a |= {f"{n}_scale_cache": torch.zeros(BLOCKS, KV_HEADS, BLOCK_SIZE) for n in "kv"}
    elif kind != "float":
        a |= {f"{n}_scale": torch.full((1,) if kind == "tensor" else (KV_HEADS,), 0.05) for n in "kv"}
        a |= {f"{n}_zero_point": points for n in "kv"} if kind == "zero" else {}
    before = registry.calls["rope_and_cache", "host_cpp"]
    q = torch.ops.gcu.rope_and_cache(**a, interleaved=row["interleaved"])
    assert registry.calls["rope_and_cache", "host_cpp"] == before + 1
    limits = tolerance(dtype, HEAD_DIM)
    torch.testing.assert_close(q.double(), rope.eager(**wide, interleaved=row["interleaved"]), **limits)
    for n in "kv":
        got, exact = (written(x[f"{n}_cache"], a["slot_mapping"]).double() for x in (a, wide))
        if kind == "float":
            torch.testing.assert_close(got, exact, **limits)
            continue
        scale = written(a[f"{n}_scale_cache"], a["slot_mapping"]).unsqueeze(-1) if kind == "token_head" else 0.05
        back = (got - (points.view(1, -1, 1) if kind == "zero" else 0)) * scale
        assert ((back - exact).abs() <= 0.5 * scale + 1e-5 * exact.abs()).all()


@pytest.mark.parametrize("isa", build.available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_go_straight_from_input_to_cache(isa, dtype, monkeypatch):
    """No norm, nothing to quantise, a rotation in halves of whole vectors: the kernel's short way."""
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    a = inputs(dtype, v_dim=20)
    wide = {n: x.double() if x.is_floating_point() else x for n, x in a.items()}
    q = torch.ops.gcu.rope_and_cache(**a)
    torch.testing.assert_close(q.double(), rope.eager(**wide), **tolerance(dtype, 2))
    for n in ("k_cache", "v_cache"):
        torch.testing.assert_close(a[n].double(), wide[n], **tolerance(dtype, 2))


@pytest.mark.parametrize("kind", ["float", "tensor", "token_head"])
def test_write_kv_is_the_write_of_rope_and_cache(kind):
    a = inputs(torch.bfloat16, None if kind == "float" else torch.int8, rotary=0)
    if kind == "token_head":
        a |= {f"{n}_scale_cache": torch.zeros(BLOCKS, KV_HEADS, BLOCK_SIZE) for n in "kv"}
    elif kind == "tensor":
        a |= {f"{n}_scale": torch.full((1,), 0.05) for n in "kv"}
    names = ("k_cache", "v_cache", *(n for n in a if "scale" in n))
    b = {n: a[n].clone() for n in names}
    c = {n: a[n].clone() for n in names}
    torch.ops.gcu.rope_and_cache(**a)
    _, k, v = a["qkv"].split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], 1)
    k, v = (x.view(TOKENS, KV_HEADS, HEAD_DIM) for x in (k, v))
    torch.ops.gcu.write_kv(k, v, a["slot_mapping"], **b)
    write.eager(k, v, a["slot_mapping"], **c)
    for n in names:
        assert torch.equal(a[n], b[n]) and torch.equal(b[n], c[n]), n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(9, 3, 32)}, r"k is torch.float32 \(9, 3, 32\)"),
        ({"slot_mapping": torch.zeros(9)}, "slot_mapping is torch.float32"),
        ({"slot_mapping": torch.full((9,), 64)}, r"slot_mapping\[0\] is 64"),
        ({"k_scale": torch.ones(1)}, "expected torch.int8"),
    ],
)
def test_bad_arguments_of_write_kv_are_named(change, message):
    a = inputs(torch.float32)
    given = {"k": torch.ones(9, 2, 32), "v": torch.ones(9, 2, 32), **{n: a[n] for n in list(a)[3:]}}
    with pytest.raises(InvalidInputError, match="gcu::write_kv: .*" + message):
        torch.ops.gcu.write_kv(**{**given, **change})


def test_debug_checks_find_a_slot_that_is_written_twice(monkeypatch):
    a = inputs(torch.float32) | {"slot_mapping": torch.full((9,), 1)}
    torch.ops.gcu.rope_and_cache(**a)
    monkeypatch.setenv("GCU_COMPILE_DEBUG_CHECKS", "1")
    with pytest.raises(InvalidInputError, match="one slot for two tokens"):
        torch.ops.gcu.rope_and_cache(**a)


def test_operation_mutates_its_caches_when_compiled():
    a, b = inputs(torch.float32), inputs(torch.float32)
    compiled = torch.compile(
        lambda **k: torch.ops.gcu.rope_and_cache(**k) + 1, backend="gcu", options={"inductor": False}
    )
    torch.testing.assert_close(compiled(**a), rope.eager(**b) + 1, **tolerance(torch.float32, 2))
    torch.testing.assert_close(a["k_cache"], b["k_cache"], **tolerance(torch.float32, 2))
    assert a["k_cache"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(9, 321).double()}, "qkv's row is 321"),
        ({"k_cache": torch.ones(4, 2, 24, 32)}, "k_cache's block size is 24"),
        ({"cos_sin": torch.ones(64, 34)}, r"cos_sin is \(64, 34\), expected \[rows, even size up to 32\]"),
        ({"positions": torch.zeros(9)}, "positions is torch.float32"),
        ({"positions": torch.full((9,), 64)}, r"positions\[0\] is 64, expected a row from 0 to 63"),
        ({"slot_mapping": torch.full((9,), 64)}, r"slot_mapping\[0\] is 64, expected -1 \(not written\)"),
        ({"slot_mapping": torch.full((9,), -2)}, r"slot_mapping\[0\] is -2"),
        ({"slot_mapping": torch.zeros(8, dtype=torch.int64)}, "slot_mapping is torch.int64"),
        ({"q_norm": torch.ones(8)}, r"q_norm is \(8,\), expected \[32\]"),
        ({"k_scale": torch.ones(1)}, "expected torch.int8"),
        ({"v_scale_cache": torch.ones(4, 2, 16)}, "v_scale_cache"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(InvalidInputError, match="gcu::rope_and_cache: .*" + message):
        torch.ops.gcu.rope_and_cache(**{**inputs(), **change})
