"""`gcu::rope_and_cache`: its meaning against transformers' rotary embedding, its writes, and bad arguments by name."""

import pytest
import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels.attention import rope
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
        ({"slot_mapping": torch.full((9,), 1)}, "one slot for two tokens"),
        ({"slot_mapping": torch.zeros(8, dtype=torch.int64)}, "slot_mapping is torch.int64"),
        ({"q_norm": torch.ones(8)}, r"q_norm is \(8,\), expected \[32\]"),
        ({"k_scale": torch.ones(1)}, "expected torch.int8"),
        ({"v_scale_cache": torch.ones(4, 2, 16)}, "v_scale_cache"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(InvalidInputError, match="gcu::rope_and_cache: .*" + message):
        torch.ops.gcu.rope_and_cache(**{**inputs(), **change})
