"""The attention family's Triton kernels in the interpreter, against the operations' meanings in float64."""

import pytest
import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import dense, mla, paged, rope
from gcu_compile.kernels.attention import write as write_kv
from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.kernels.triton import attention, paged_attention, rope_and_cache

pytest.importorskip("triton")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def close(actual, expected, dtype, length):
    torch.testing.assert_close(actual.double(), expected.double(), **tolerance(dtype, length))


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def scales(g, shape, zero_points):
    """Scales around what makes int8 codes of spread 40 have spread 1, and zero points where asked for."""
    found = {f"{name}_scale": torch.rand(shape, generator=g) * 0.02 + 0.01 for name in "kv"}
    if zero_points:
        found |= {f"{n}_zero_point": torch.randint(-20, 20, shape, generator=g, dtype=torch.int32) for n in "kv"}
    return found


PAGED = {
    "mixed batch": {},
    "float16, heads of 80, 3 per group": {"dtype": F16, "size": 80, "heads": 6},
    "bfloat16": {"dtype": BF16},
    "head_dim innermost": {"transposed": False},
    "one key per block": {"block": 1, "queries": (1, 1), "keys": (9, 3)},
    "blocks of 128, unequal sizes": {"block": 128, "heads": 9, "kv_heads": 3, "size": 96, "v_size": 48},
    "decode, 4 splits": {"queries": (1, 1, 1), "keys": (100, 1, 33), "heads": 8, "splits": 4},
    "splits and sinks": {"splits": 3, "sinks": True},
    "window and sinks": {"window": 7, "sinks": True},
    "soft cap": {"soft_cap": 5.0},
    "alibi": {"alibi": True},
    "all keys": {"causal": False, "splits": 2},
    "int8 per tensor": {"int8": ()},
    "int8 per head, zero points, splits": {"int8": "head", "zero_points": True, "splits": 2},
    "int8 per token and head, zero points": {"int8": "token", "zero_points": True, "dtype": BF16, "block": 64},
}


@pytest.mark.parametrize("name", PAGED)
def test_paged_attention(name):
    asked = {"dtype": F32, "heads": 4, "kv_heads": 2, "size": 32, "block": 16, "queries": (1, 5, 0, 20),
             "keys": (37, 5, 12, 50), "transposed": True, "splits": None, "int8": None} | PAGED[name]  # fmt: skip
    g, dtype, size, block = numbers(), asked["dtype"], asked["size"], asked["block"]
    v_size, kv_heads, lens = asked.get("v_size", size), asked["kv_heads"], asked["keys"]
    queries = torch.tensor([0, *torch.tensor(asked["queries"]).cumsum(0)], dtype=torch.int32)
    q = torch.randn(int(queries[-1]) + 2, asked["heads"], size, generator=g).to(dtype)  # two tokens of padding
    # Blocks in random order; entries that no key needs are out of range.
    blocks = [-(-length // block) for length in lens]
    table = torch.full((len(lens), max(blocks) + 1), -5, dtype=torch.int32)
    ids, used = torch.randperm(sum(blocks) + 3, generator=g).int(), 0
    for row, count in zip(table, blocks, strict=True):
        row[:count], used = ids[used : used + count], used + count
    k, v = (torch.randn(len(ids), kv_heads, block, n, generator=g) for n in (size, v_size))
    given = {}
    if asked["int8"] is not None:
        k, v = ((x * 40).round().clamp(-128, 127).to(torch.int8) for x in (k, v))
        shape = {(): (), "head": (kv_heads,), "token": (len(ids), kv_heads, block)}[asked["int8"]]
        given = scales(g, shape, asked.get("zero_points"))
    else:
        k, v = k.to(dtype), v.to(dtype)
    if asked.get("alibi"):
        given["alibi_slopes"] = torch.rand(asked["heads"], generator=g) * 0.3
    if asked.get("sinks"):
        given["sinks"] = torch.randn(asked["heads"], generator=g)
    chosen = {key: asked[key] for key in ("window", "soft_cap", "causal") if key in asked}
    chosen |= {"scale": size**-0.5}
    stored = paged_attention.key_cache(*k.shape, k.dtype, "cpu").copy_(k) if asked["transposed"] else k
    tables = (table, queries, torch.tensor(lens, dtype=torch.int32))
    out = paged_attention.attend(q, stored, v, *tables, **given, **({"causal": True} | chosen), splits=asked["splits"])
    wide = (x if x.dtype == torch.int8 else x.double() for x in (k, v))
    close(out, paged.eager(q.double(), *wide, *tables, **given, **chosen), dtype, max(size, *lens))


def test_a_table_out_of_range_reads_within_the_cache():
    k = paged_attention.key_cache(2, 1, 16, 16, F32, "cpu").fill_(1.0)
    v = torch.ones(2, 1, 16, 16)
    tables = (torch.tensor([[10**6]]).int(), torch.tensor([0, 1]).int(), torch.tensor([5]).int())
    out = paged_attention.run(torch.ones(1, 1, 16), k, v, *tables, scale=1.0)
    assert torch.equal(out, torch.ones(1, 1, 16))


@pytest.mark.parametrize("target", ["gcu300", "cuda"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_mla_attention(dtype, target, monkeypatch):
    """gcu300 reads a transposed copy of the latents as keys, the others the cache itself."""
    monkeypatch.setattr(paged_attention, "target_of", lambda tensor: target)
    g, heads, nope, rotary, rank, v_size = numbers(), 4, 24, 8, 64, 20
    q = torch.randn(9, heads, nope + rotary, generator=g).to(dtype)
    cache = torch.randn(12, 16, rank + rotary, generator=g).to(dtype)
    up_k, up_v = ((torch.randn(heads, *s, generator=g) * 0.1).to(dtype) for s in ((nope, rank), (rank, v_size)))
    tables = (torch.tensor([[3, 1, 5], [2, 0, -1]]).int(), torch.tensor([0, 1, 8]).int(), torch.tensor([40, 20]).int())
    assert paged_attention.refuses_mla(q, cache, up_k) is None
    out = paged_attention.run_mla(q, cache, up_k, up_v, *tables, scale=0.2)
    expected = mla.eager(*(x.double() for x in (q, cache, up_k, up_v)), *tables, scale=0.2)
    close(out, expected, dtype, rank + rotary)


DENSE = {
    "cross": {},
    "bfloat16, heads of 80": {"dtype": BF16, "size": 80},
    "causal": {"dtype": F16, "causal": True},
    "offset and window": {"causal": True, "causal_offset": 16, "window": 9},
    "rows that see nothing": {"causal": True, "causal_offset": -5},
    "bias per query and key": {"bias": (1, 1, 37, 53)},
    "mask per batch and key": {"bias": (2, 1, 1, 53), "mask": True},
    "bias per key, soft cap": {"bias": (53,), "soft_cap": 5.0},
    "bias per query": {"bias": (37, 1)},
    "alibi and sinks": {"causal": True, "alibi": True, "sinks": True},
    "several tiles": {"k_len": 200, "q_len": 130, "size": 96, "v_size": 40, "causal": True},
    "one query, one key": {"k_len": 1, "q_len": 1},
}


@pytest.mark.parametrize("target", ["gcu300", "cuda"])
@pytest.mark.parametrize("name", DENSE)
def test_attention(name, target, monkeypatch):
    monkeypatch.setattr(attention, "target_of", lambda tensor: target)
    asked = {"dtype": F32, "q_len": 37, "k_len": 53, "size": 32} | DENSE[name]
    g, dtype, size = numbers(1), asked["dtype"], asked["size"]
    q = torch.randn(2, 4, asked["q_len"], size, generator=g).to(dtype)
    k = torch.randn(2, 2, asked["k_len"], size, generator=g).to(dtype)
    v = torch.randn(2, 2, asked["k_len"], asked.get("v_size", size), generator=g).to(dtype)
    bias = torch.randn(asked["bias"], generator=g) if "bias" in asked else None
    bias = bias > -0.5 if asked.get("mask") else bias
    alibi = torch.rand(4, generator=g) if asked.get("alibi") else None
    sinks = torch.randn(4, generator=g) if asked.get("sinks") else None
    chosen = {key: asked[key] for key in ("causal", "causal_offset", "window", "soft_cap") if key in asked}
    assert attention.refuses(q, k, v) is None
    out = attention.run(q, k, v, bias, alibi, sinks, scale=size**-0.5, **chosen)
    expected = dense.eager(q.double(), k.double(), v.double(), bias, alibi, sinks, scale=size**-0.5, **chosen)
    close(out, expected, dtype, max(size, asked["k_len"]))


ROPE = {
    "neox": {},
    "bfloat16, norms": {"dtype": BF16, "norm": True},
    "float16, partial, interleaved": {"dtype": F16, "rotary": 20, "interleaved": True},
    "no rotation, norms": {"rotary": 0, "norm": True},
    "sizes apart, a row per token": {"size": 80, "v_size": 48, "rotary": 40, "positions": False, "heads": 9},
    "int8 per tensor": {"int8": ()},
    "int8 per head, zero points": {"int8": "head", "zero_points": True, "rotary": 16},
    "int8 per token and head": {"int8": "token", "rotary": 16, "norm": True},
    "bfloat16 into float32, head_dim innermost": {"dtype": BF16, "cache": F32, "transposed": False},
}


@pytest.mark.parametrize("name", ROPE)
def test_rope_and_cache(name):
    asked = {"dtype": F32, "heads": 6, "size": 32, "positions": True, "transposed": True, "int8": None} | ROPE[name]
    g, dtype, size, block, kv_heads, tokens = numbers(1), asked["dtype"], asked["size"], 16, 3, 7
    v_size, kind = asked.get("v_size", size), asked.get("cache", asked["dtype"])
    kind = kind if asked["int8"] is None else torch.int8
    qkv = torch.randn(tokens, (asked["heads"] + kv_heads) * size + kv_heads * v_size, generator=g).to(dtype)
    cos_sin = torch.randn(50, asked.get("rotary", size), generator=g)
    positions = torch.randint(0, 50, (tokens,), generator=g) if asked["positions"] else None
    slots = torch.randperm(5 * block, generator=g)[:tokens]
    slots[1] = -1
    norms = [torch.randn(size, generator=g).to(dtype) if asked.get("norm") else None for _ in "qk"]
    fixed = {}
    if asked["int8"] in ((), "head"):
        fixed = scales(g, () if asked["int8"] == () else (kv_heads,), asked.get("zero_points"))

    def caches(transposed):
        k, v = (torch.zeros(5, kv_heads, block, n, dtype=kind) for n in (size, v_size))
        k = paged_attention.key_cache(*k.shape, kind, "cpu") if transposed else k
        made = {f"{n}_scale_cache": torch.zeros(5, kv_heads, block) for n in "kv"} if asked["int8"] == "token" else {}
        return k, v, made

    chosen = {"interleaved": asked.get("interleaved", False)}
    mine, meant = caches(asked["transposed"]), caches(False)
    arguments = (qkv, cos_sin, positions, slots)
    assert rope_and_cache.refuses(*arguments, *mine[:2]) is None
    q = rope_and_cache.run(*arguments, *mine[:2], *norms, **fixed, **mine[2], **chosen)
    expected = rope.eager(*arguments, *meant[:2], *norms, **fixed, **meant[2], **chosen)
    close(q, expected, dtype, size)
    for actual, wanted in zip(mine[:2], meant[:2], strict=True):
        if kind == torch.int8:
            assert torch.equal(actual, wanted)
        else:
            close(actual, wanted, kind, size)
    for key in mine[2]:
        close(mine[2][key], meant[2][key], F32, size)


@pytest.mark.parametrize("int8", [False, True])
def test_write_kv(int8):
    g = numbers(2)
    k, v = torch.randn(7, 3, 32, generator=g), torch.randn(7, 3, 20, generator=g)
    slots = torch.tensor([4, -1, 70, 33, 0, 12, 79])
    kind = torch.int8 if int8 else F32
    caches = [[torch.zeros(5, 3, 16, n, dtype=kind) for n in (32, 20)] for _ in range(2)]
    caches[0][0] = paged_attention.key_cache(5, 3, 16, 32, kind, "cpu")
    scales = [{f"{n}_scale_cache": torch.zeros(5, 3, 16) for n in "kv"} if int8 else {} for _ in range(2)]
    assert rope_and_cache.refuses_write(k, v, slots, *caches[0]) is None
    rope_and_cache.write(k, v, slots, *caches[0], **scales[0])
    write_kv.eager(k, v, slots, *caches[1], **scales[1])
    for mine, meant in zip((*caches[0], *scales[0].values()), (*caches[1], *scales[1].values()), strict=True):
        assert torch.equal(mine, meant)


def test_refusals_say_why(monkeypatch):
    q, v = torch.zeros(1, 2, 32), torch.zeros(4, 1, 16, 32)
    assert "torch.float64" in paged_attention.refuses(q.double(), v, v, None)
    assert "expected q's dtype or int8" in paged_attention.refuses(q.half(), v, v, None)
    assert "transposed tiles" in paged_attention.refuses(q, v, v, None)
    monkeypatch.setenv("GCU_COMPILE_TARGET", "gcu400")
    assert paged_attention.refuses(q, v, v, None) is None
    assert "256 heads" in attention.refuses(*(torch.zeros(1, 256, 1, 8),) * 3)
    assert "not contiguous" in rope_and_cache.refuses(torch.zeros(8, 2).t(), q[0], None, None, v, v)


@pytest.mark.parametrize("name", ["attention", "paged_attention", "paged_attention_int8", "mla_attention",
                                  "rope_and_cache", "write_kv"])  # fmt: skip
def test_operation_names_its_kernel(name):
    kernel = {i.name: i for i in registry.get(name).implementations}["triton"]
    assert kernel.devices == ("cuda", "gcu")
