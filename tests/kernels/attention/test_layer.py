"""A layer's prepared calls say what the operations say, bit for bit, however its tensors move; and refuse the same."""

import pytest
import torch
from paged_case import case

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.attention.layer import Layer, Step

TABLES = ("block_table", "query_start_loc", "seq_lens")
HEADS, KV_HEADS, SIZE = 6, 2, 32
MIXED = ([1, 33, 0, 17, 48, 310], [1, 33, 0, 1, 7, 150])


def batch(lens=MIXED, dtype=torch.bfloat16, cache="float", **more):
    return case(*lens, heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE, dtype=dtype, cache=cache, **more).arguments


def layer(a, **settings):
    names = [n for n in ("k_scale", "v_scale", "k_zero_point", "v_zero_point") if n in a]
    scales = {f"{n}_cache" if n.endswith("scale") and a[n].dim() == 3 else n: a[n] for n in names}
    return Layer(a["q"].dtype, HEADS, a["k_cache"], a["v_cache"], scale=a["scale"], **scales, **settings)


def attend(of, a, **more):
    output = torch.full_like(a["q"], torch.nan)
    of.attend(a["q"], output, Step(*(a[name] for name in TABLES), **more))
    return output


def ran(op):
    return registry.calls[op, "host_cpp"]


def keys(a, tokens, seed=0):
    """Keys and values cut out of one tensor, as a model's are, and slots of which the last is padding."""
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens + 1, (HEADS + 2 * KV_HEADS) * SIZE, generator=source).to(a["q"].dtype)
    parts = rows.split([HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], 1)[1:]
    k, v = (x.view(-1, KV_HEADS, SIZE) for x in parts)
    slots = torch.randperm(a["k_cache"].shape[0] * a["k_cache"].shape[2], generator=source)[:tokens]
    slots[-1] = -1
    return k, v, slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cache", ["float", "token_head", "tensor", "head"])
def test_attend_is_the_operation(dtype, cache):
    a = batch(dtype=dtype, cache=cache, padding=3, zero=cache == "head")
    more = {"window": 40, "soft_cap": 3.0, "alibi_slopes": torch.rand(HEADS), "sinks": torch.randn(HEADS).bfloat16()}
    for settings in ({}, more):
        expected, before = torch.ops.gcu.paged_attention(**a, **settings), ran("paged_attention")
        assert torch.equal(attend(layer(a, **settings), a), expected)
        assert ran("paged_attention") == before + (dtype != torch.float64)  # float64 has no kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cache", ["float", "token_head", "tensor", "head"])
def test_write_is_the_operation(dtype, cache):
    a, b = (batch(dtype=dtype, cache=cache, zero=cache == "head") for _ in "ab")
    k, v, slots = keys(a, 9)
    kept = "_cache" if cache == "token_head" else ""
    scales = {f"{n}_scale{kept}": b[f"{n}_scale"] for n in "kv" if f"{n}_scale" in b}
    scales |= {f"{n}_zero_point": b[f"{n}_zero_point"] for n in "kv" if cache == "head"}
    torch.ops.gcu.write_kv(k[:9], v[:9], slots, b["k_cache"], b["v_cache"], **scales)
    before = ran("write_kv")
    layer(a).write(k, v, slots)
    assert ran("write_kv") == before + (dtype != torch.float64)
    written = [name for name in ("k_cache", "v_cache", "k_scale", "v_scale") if name in a]
    assert all(torch.equal(a[name], b[name]) for name in written)
    assert not torch.equal(a["k_cache"], batch(dtype=dtype, cache=cache, zero=cache == "head")["k_cache"])


def test_nothing_of_one_step_is_left_in_the_next():
    first = batch()
    kept = layer(first)
    for lens in (MIXED, ([5], [1]), ([64, 7], [2, 7]), ([0], [0])):
        a = {**batch(lens, seed=len(lens[0])), "k_cache": first["k_cache"], "v_cache": first["v_cache"]}
        a["block_table"] = a["block_table"] % len(first["k_cache"])
        expected = torch.ops.gcu.paged_attention(**a)
        assert torch.equal(attend(kept, a), expected)
        wide = torch.cat([a["q"].flatten(1)] * 2, 1)[:, SIZE : SIZE * (HEADS + 1)]  # another stride from token to token
        a["q"] = wide.view(-1, HEADS, SIZE)
        assert torch.equal(attend(kept, a), torch.ops.gcu.paged_attention(**a))


def test_tables_and_caches_are_read_at_each_call():
    a = batch()
    kept, step = layer(a), Step(*(a[name] for name in TABLES))
    output = torch.empty_like(a["q"])
    a["seq_lens"][-1] -= 100
    a["block_table"][-1, :13] = a["block_table"][-1, :13].flip(0)
    a["k_cache"].mul_(-1)
    kept.attend(a["q"], output, step)
    assert torch.equal(output, torch.ops.gcu.paged_attention(**a))


def test_parameters_may_change_and_move():
    a, sinks = batch(), torch.nn.Parameter(torch.zeros(HEADS), requires_grad=False)
    kept = layer(a, sinks=sinks)
    for change in (lambda: sinks.copy_(torch.randn(HEADS)), lambda: setattr(sinks, "data", torch.ones(HEADS))):
        change()
        assert torch.equal(attend(kept, a), torch.ops.gcu.paged_attention(**a, sinks=sinks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"q": a["q"][..., :16]}, "k_cache's head size is 32, expected q's, 16"),
        (lambda a: {"q": a["q"][:, :5]}, "q's heads is 5, expected a multiple of the cache's 2"),
        (lambda a: {"q": a["q"][:20]}, "query_start_loc"),
        (lambda a: {"seq_lens": -a["seq_lens"]}, r"seq_lens\[0\] is -1"),
        (lambda a: {"block_table": a["block_table"] + 1000}, r"block_table\[0\]\[0\] is 10"),
        (lambda a: {"seq_lens": a["seq_lens"].long()}, "seq_lens's dtype is torch.int64"),
        (lambda a: {"query_start_loc": a["query_start_loc"][1:]}, r"query_start_loc is \(6,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    a = batch()
    kept = layer(a)
    with pytest.raises(InvalidInputError, match="gcu::paged_attention: .*" + message):
        attend(kept, {**a, **change(a)})


def test_bad_writes_are_named():
    a = batch()
    kept, (k, v, slots) = layer(a), keys(a, 4)
    tables = [a[name] for name in TABLES]
    for bad, message in ((10**6, r"slot_mapping\[0\] is 1000000"), (-2, r"slot_mapping\[0\] is -2")):
        slots[0] = bad
        with pytest.raises(InvalidInputError, match="gcu::write_kv: " + message):
            kept.write(k, v, slots)
    with pytest.raises(InvalidInputError, match="slot_mapping is torch.int32"):
        Step(*tables, slots.int())
    with pytest.raises(InvalidInputError, match="gcu::write_kv: k is "):
        kept.write(k[..., :16], v, slots.clamp(0, 1))
    with pytest.raises(InvalidInputError, match=r"slot_mapping is torch.int64 \(4,\), expected int64 \[2\]"):
        kept.write(k[:2], v[:2], slots.clamp(0, 1))
    with pytest.raises(InvalidInputError, match="k_scale is None"):
        layer(a | {"k_cache": a["k_cache"].to(torch.int8), "v_cache": a["v_cache"].to(torch.int8)})


def test_debug_checks_see_a_slot_written_twice(monkeypatch):
    a = batch()
    k, v, slots = keys(a, 4)
    slots[:2] = 3
    monkeypatch.setenv("GCU_COMPILE_DEBUG_CHECKS", "1")
    with pytest.raises(InvalidInputError, match="one slot for two tokens"):
        layer(a).write(k, v, slots)


def test_shadow_check_sees_the_operations(monkeypatch):
    a, seen = batch(), []

    def watcher(op, implementation, run, site, args, kwargs):
        seen.append((op.name, implementation))
        return run(*args, **kwargs)

    monkeypatch.setattr(registry, "watcher", watcher)
    k, v, slots = keys(a, 4)
    kept, step = layer(a), Step(*(a[name] for name in TABLES), slots)
    kept.write(k, v, step.slot_mapping)
    kept.attend(a["q"], torch.empty_like(a["q"]), step)
    assert seen == [("write_kv", "host_cpp"), ("paged_attention", "host_cpp")]


def test_instruction_set_is_that_of_the_call(monkeypatch):
    a = batch(dtype=torch.float32)
    kept = layer(a)
    for isa in ("portable", "auto"):
        monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
        assert torch.equal(attend(kept, a), torch.ops.gcu.paged_attention(**a))


def turned(a, tokens, seed=1, norms=False):
    """Arguments of a rotation: rows of q, k and v, a table, positions, and slots of which the last is padding."""
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * SIZE, generator=source).to(a["q"].dtype)
    table = torch.randn(50, 24, generator=source).to(a["q"].dtype)
    slots = torch.randperm(a["k_cache"].shape[0] * a["k_cache"].shape[2], generator=source)[:tokens]
    slots[-1] = -1
    given = [rows, table, torch.randint(0, 50, (tokens,), generator=source), slots]
    return [*given, *(torch.rand(2, SIZE, generator=source).to(a["q"].dtype) if norms else ())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cache", ["float", "token_head", "tensor", "head"])
@pytest.mark.parametrize("norms", [False, True])
def test_rotate_and_write_is_the_operation(dtype, cache, norms):
    a, b = (batch(dtype=dtype, cache=cache, zero=cache == "head") for _ in "ab")
    mine, theirs = layer(a), layer(b)
    for tokens in (9, 1, 4):
        given, how = turned(a, tokens, norms=norms), {"interleaved": cache == "head", "eps": 1e-5}
        before = ran("rope_and_cache")
        q = mine.rotate_and_write(*given, **how)
        assert ran("rope_and_cache") == before + (dtype != torch.float64)
        rows, table, positions, slots, *weights = given
        named = dict(zip(("q_norm", "k_norm"), weights, strict=False))
        assert torch.equal(
            q, torch.ops.gcu.rope_and_cache(rows, table, positions, slots, **theirs.written, **named, **how)
        )
        written = [name for name in ("k_cache", "v_cache", "k_scale", "v_scale") if name in a]
        assert all(torch.equal(a[name], b[name]) for name in written)


def test_rotations_by_another_table_by_rows_and_of_fewer_slots():
    a, b = batch(), batch()
    mine, theirs = layer(a), layer(b)
    rows, table, positions, slots = turned(a, 6)
    for angles, places in ((table, positions), (table * 2, positions), (table[positions], None)):
        q = mine.rotate_and_write(rows, angles, places, slots[:4])
        padded = torch.cat([slots[:4], torch.tensor([-1, -1])])
        assert torch.equal(q, torch.ops.gcu.rope_and_cache(rows, angles, places, padded, **theirs.written))
        assert torch.equal(a["k_cache"], b["k_cache"]) and torch.equal(a["v_cache"], b["v_cache"])
    table.mul_(3)  # in place: its numbers are read at each call
    assert torch.equal(
        mine.rotate_and_write(rows, table, positions, slots),
        torch.ops.gcu.rope_and_cache(rows, table, positions, slots, **theirs.written),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.full((6,), 10**6)}, r"slot_mapping\[0\] is 1000000"),
        ({2: torch.full((6,), 50)}, r"positions\[0\] is 50"),
        ({2: torch.zeros(5, dtype=torch.int64)}, "positions is torch.int64"),
        ({2: torch.zeros(6)}, "positions is torch.float32"),
        ({0: torch.zeros(6, 64).bfloat16()}, "qkv's row is 64"),
        ({1: torch.zeros(50, 34).bfloat16()}, "cos_sin is"),
        ({4: torch.ones(7)}, "q_norm is"),
    ],
)
def test_bad_rotations_are_named(change, message):
    a = batch()
    given = dict(enumerate([*turned(a, 6), None])) | change
    with pytest.raises(InvalidInputError, match="gcu::rope_and_cache: " + message):
        layer(a).rotate_and_write(*given.values())


def test_shadow_check_sees_a_rotation_and_where_it_stands(monkeypatch):
    a, seen = batch(), []

    def watcher(op, implementation, run, site, args, kwargs):
        seen.append((op.name, site))
        return run(*args, **kwargs)

    monkeypatch.setattr(registry, "watcher", watcher)
    layer(a).rotate_and_write(*turned(a, 4), site="rule|layer 3|")
    assert seen == [("rope_and_cache", "rule|layer 3|")]
