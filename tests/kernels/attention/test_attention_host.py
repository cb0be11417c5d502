"""The C++ kernels of attention against the meaning in float64: all options pairwise, every instruction set."""

import pytest
import torch
from amx_emulation import BEST, EMULATED, ISAS
from covering import pairwise
from paged_case import case, double

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import dense, paged
from gcu_compile.kernels.tolerance import tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENS = {
    "decode": ([17, 1, 128, 300], [1, 1, 1, 1]),
    "verify": ([17, 5, 300], [4, 5, 3]),
    "prefill": ([1, 33, 130], [1, 33, 130]),
    "mixed": ([1, 33, 0, 17, 48, 5, 310], [1, 33, 0, 1, 7, 0, 150]),
}
CACHES = [("float", False), *((kind, zero) for kind in ("tensor", "head", "token_head") for zero in (False, True))]
PAGED_FACTORS = {
    "isa": ISAS,
    "dtype": DTYPES,
    "cache": CACHES,
    "sizes": [*((n, n) for n in (32, 64, 80, 112, 120, 128, 256)), (96, 64), (192, 128), (33, 7)],
    "heads": [(1, 1), (4, 4), (6, 2), (7, 1), (16, 2), (100, 1)],
    "block_size": [1, 16, 32, 128],
    "lens": list(LENS),
    "causal": [True, False],
    "window": [None, 1, 40],
    "soft_cap": [0.0, 3.0],
    "alibi": [False, True],
    "sinks": [False, True],
    "padding": [0, 3],
}
# A bfloat16 query on a bfloat16 or int8 cache has arithmetics of its own: all options of those, too.
OWN = {"isa": [isa for isa in ISAS if isa in ("avx512", "amx", EMULATED)], "dtype": [torch.bfloat16]}
PAGED = pairwise(PAGED_FACTORS) + (pairwise(PAGED_FACTORS | OWN) if OWN["isa"] else [])


def name(row):
    return "-".join(str(value).replace("torch.", "") for value in row.values()).replace(" ", "")


def extras(row, heads):
    source = torch.Generator().manual_seed(1)
    found = {"causal": row["causal"], "window": row["window"], "soft_cap": row["soft_cap"]}
    if row["alibi"]:
        found["alibi_slopes"] = torch.rand(heads, generator=source) * 0.3
    if row["sinks"]:
        found["sinks"] = torch.randn(heads, generator=source)
    return found


def ran(op):
    return registry.calls[op, "host_cpp"]


@pytest.mark.parametrize("row", PAGED, ids=name)
def test_paged_covering_array(row, use_isa):
    use_isa(row["isa"])
    (heads, kv_heads), (head_dim, v_dim), (kind, zero) = row["heads"], row["sizes"], row["cache"]
    batch = case(*LENS[row["lens"]], heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_dim=v_dim, cache=kind,
                 block_size=row["block_size"], dtype=row["dtype"], zero=zero, padding=row["padding"])  # fmt: skip
    arguments = {**batch.arguments, **extras(row, heads)}
    before = ran("paged_attention")
    got = torch.ops.gcu.paged_attention(**arguments)
    assert ran("paged_attention") == before + 1
    length = max(head_dim, max(LENS[row["lens"]][0]))
    torch.testing.assert_close(got.double(), paged.eager(**double(arguments)), **tolerance(row["dtype"], length))


DENSE_FACTORS = {
    "isa": ISAS,
    "dtype": DTYPES,
    "sizes": [(64, 64), (80, 80), (72, 40), (128, 128), (1, 1)],
    "heads": [(1, 1), (4, 4), (6, 2)],
    "lengths": [(1, 1), (1, 77), (130, 130), (37, 300), (300, 37), (5, 0)],
    "bias": [None, "bool", "float", "same", "row", "key_last"],
    "causal": [True, False],
    "offset": [0, 9, -4],
    "window": [None, 1, 40],
    "soft_cap": [0.0, 3.0],
    "alibi": [False, True],
    "sinks": [False, True],
    "layout": ["contiguous", "transposed", "strided"],
}
DENSE = pairwise(DENSE_FACTORS) + (pairwise(DENSE_FACTORS | OWN) if OWN["isa"] else [])


def bias_of(kind, dtype, shape):
    batch, heads, q_len, kv_len = shape
    source = torch.Generator().manual_seed(2)
    if kind in ("bool", "key_last"):
        keep = torch.rand(batch, 1, q_len, kv_len, generator=source) < 0.7
        return keep.transpose(2, 3).contiguous().transpose(2, 3) if kind == "key_last" else keep
    if kind == "row":  # a padding mask of keys
        return torch.where(torch.rand(batch, 1, 1, kv_len, generator=source) < 0.7, 0.0, -torch.inf)
    found = torch.randn(batch if kind == "same" else 1, heads, q_len, kv_len, generator=source)
    return found.to(dtype) if kind == "same" else found


@pytest.mark.parametrize("row", DENSE, ids=name)
def test_dense_covering_array(row, use_isa):
    use_isa(row["isa"])
    (heads, kv_heads), (head_dim, v_dim), (q_len, kv_len) = row["heads"], row["sizes"], row["lengths"]
    source = torch.Generator().manual_seed(3)

    def random(heads, length, size):
        shape = (2, length, heads, size) if row["layout"] == "transposed" else (2, heads, length, size)
        x = torch.randn(shape, generator=source)
        if row["layout"] == "strided":
            x = x.transpose(2, 3).contiguous().transpose(2, 3)  # values of a head are not adjacent
        return (x.transpose(1, 2) if row["layout"] == "transposed" else x).to(row["dtype"])

    q, k, v = random(heads, q_len, head_dim), random(kv_heads, kv_len, head_dim), random(kv_heads, kv_len, v_dim)
    asked = {**extras(row, heads), "causal_offset": row["offset"], "scale": head_dim**-0.5}
    if row["bias"]:
        asked["bias"] = bias_of(row["bias"], row["dtype"], (2, heads, q_len, kv_len))
    before = ran("attention")
    got = torch.ops.gcu.attention(q, k, v, **asked)
    assert ran("attention") == before + 1 and got.dtype == row["dtype"]
    wide = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in asked.items()}
    expected = dense.eager(q.double(), k.double(), v.double(), **wide)
    torch.testing.assert_close(got.double(), expected, **tolerance(row["dtype"], max(head_dim, kv_len)))


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", ["float", "token_head"])
def test_context_of_32k_is_cut_into_parts(isa, dtype, cache, use_isa, monkeypatch):
    use_isa(isa)
    batch = case([32768 - 5], [2], heads=4, kv_heads=2, head_dim=64, dtype=dtype, cache=cache, block_size=64)
    expected = paged.eager(**double(batch.arguments))
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        got = torch.ops.gcu.paged_attention(**batch.arguments)
        torch.testing.assert_close(got.double(), expected, **tolerance(dtype, 32768))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [(5, 5), (40, 20), (16, 8)])  # KV heads: one walk over the keys, two, one in pieces
@pytest.mark.parametrize("cache", ["float", "token_head"])
@pytest.mark.parametrize("isa", ISAS)
def test_kv_heads_side_by_side(isa, cache, heads, threads, use_isa, monkeypatch):
    use_isa(isa)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lens = [1300, 3, 0, 700, 90]  # two of which are cut into parts where threads are to share them
    batch = case(lens, [1, 1, 0, 2, 1], heads=heads[0], kv_heads=heads[1], head_dim=64, cache=cache, block_size=16,
                 dtype=torch.bfloat16, zero=cache != "float")  # fmt: skip
    got = torch.ops.gcu.paged_attention(**batch.arguments)
    expected = paged.eager(**double(batch.arguments))
    torch.testing.assert_close(got.double(), expected, **tolerance(torch.bfloat16, max(lens)))


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_output_is_the_float_one_quantised(isa, dtype, use_isa):
    use_isa(isa)
    batch = case(*LENS["mixed"], dtype=dtype, padding=2)
    got, scale = torch.ops.gcu.paged_attention_int8(**batch.arguments)
    expected, expected_scale = paged.quantise_rows(torch.ops.gcu.paged_attention(**batch.arguments))
    torch.testing.assert_close(scale, expected_scale, **tolerance(torch.float32))
    assert (got.int() - expected.int()).abs().max() <= 1 and (got != expected).float().mean() < 0.01


@pytest.mark.parametrize("isa", BEST)
def test_cache_of_any_strides(isa, use_isa):
    """vLLM's layout: keys and values of a head side by side, blocks first."""
    use_isa(isa)
    batch = case(*LENS["mixed"], dtype=torch.bfloat16)
    expected = torch.ops.gcu.paged_attention(**batch.arguments)
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 2, 3], [2, 0, 1, 3]):
        both = torch.cat([batch.arguments["k_cache"], batch.arguments["v_cache"]], -1).permute(order).contiguous()
        k, v = both.permute([order.index(i) for i in range(4)]).chunk(2, -1)
        again = torch.ops.gcu.paged_attention(**{**batch.arguments, "k_cache": k, "v_cache": v})
        assert torch.equal(again, expected)


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [5, 80])  # few rows, and tiles of them
def test_a_nan_is_not_hidden(isa, queries, dtype, use_isa):
    use_isa(isa)
    q, k, v = (torch.randn(1, 2, queries, 32).to(dtype) for _ in range(3))
    q[0, 1, 2, 3] = torch.nan
    got = torch.ops.gcu.attention(q, k, v, scale=1.0)
    assert got[0, 1, 2].isnan().all() and got.isnan().sum() == 32


@pytest.mark.parametrize("cache", ["float", "token_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_is_not_hidden_where_keys_are_cut_into_parts(isa, dtype, cache, use_isa, monkeypatch):
    use_isa(isa)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    arguments = case([4000], [1], heads=4, kv_heads=2, head_dim=64, dtype=dtype, cache=cache).arguments
    arguments["q"][0, 1, 3] = torch.nan
    got = torch.ops.gcu.paged_attention(**arguments)
    assert got[0, 1].isnan().all() and got.isnan().sum() == 64


@pytest.mark.parametrize("queries", [1, 12, 80])  # few rows of both kinds, and tiles of them
@pytest.mark.parametrize("cache", ["float", "token_head"])
@pytest.mark.parametrize("isa", ISAS)
def test_an_infinity_of_a_query_is_not_hidden(isa, cache, queries, use_isa):
    use_isa(isa)
    batch = case([300], [queries], heads=2, kv_heads=2, dtype=torch.bfloat16, cache=cache)
    batch.arguments["q"][-1, 1, 3] = torch.inf
    got, expected = torch.ops.gcu.paged_attention(**batch.arguments), paged.eager(**double(batch.arguments))
    assert expected[-1, 1].isnan().all() and expected.isnan().sum() == 32
    torch.testing.assert_close(got.double(), expected, **tolerance(torch.bfloat16, 300), equal_nan=True)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("heads", [1, 7, 9])  # of one KV head: few rows of several kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_a_value_that_is_not_finite_stays_in_its_column(isa, dtype, heads, value, use_isa):
    use_isa(isa)
    batch = case([300, 10], [1, 1], heads=heads, kv_heads=1, head_dim=64, v_dim=72, dtype=dtype)
    arguments = batch.arguments
    blocks = arguments["block_table"][:, 0]
    arguments["v_cache"][blocks[0], 0, 3, 10] = arguments["v_cache"][blocks[1], 0, 9, 71] = value
    got, expected = torch.ops.gcu.paged_attention(**arguments), paged.eager(**double(arguments))
    torch.testing.assert_close(got.double(), expected, **tolerance(dtype, 300), equal_nan=True)


@pytest.mark.parametrize("length", [1, 17, 33, 129])  # the last key of a pair is alone
@pytest.mark.parametrize("isa", ISAS)
def test_an_infinity_of_the_last_value_stays_one(isa, length, use_isa):
    use_isa(isa)
    batch = case([length], [1], heads=4, kv_heads=1, head_dim=64, dtype=torch.bfloat16, block_size=16)
    block = batch.arguments["block_table"][0, (length - 1) // 16]
    batch.arguments["v_cache"][block, 0, (length - 1) % 16, 5] = torch.inf
    got = torch.ops.gcu.paged_attention(**batch.arguments)
    expected = paged.eager(**double(batch.arguments))
    torch.testing.assert_close(got.double(), expected, **tolerance(torch.bfloat16, length))


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("queries", [1, 40])
def test_scales_of_heads_that_are_not_adjacent(isa, queries, use_isa):
    use_isa(isa)
    batch = case([100], [queries], dtype=torch.bfloat16, cache="head", zero=True)
    expected = torch.ops.gcu.paged_attention(**batch.arguments)
    names = [f"{of}_{name}" for of in "kv" for name in ("scale", "zero_point")]
    apart = {name: torch.stack([batch.arguments[name], batch.arguments[name] + 9], 1)[:, 0] for name in names}
    assert torch.equal(torch.ops.gcu.paged_attention(**batch.arguments | apart), expected)


def test_huge_values_are_not_hidden():
    k, v = (torch.randn(1, 2, 5, 32) for _ in range(2))
    big = torch.ops.gcu.attention(k * 1e4, k, v, scale=1.0)
    torch.testing.assert_close(big.double(), dense.eager((k * 1e4).double(), k.double(), v.double(), scale=1.0))


@pytest.mark.parametrize("size", [1e9, 1e18, 1e30])
@pytest.mark.parametrize("queries", [1, 4, 96])
@pytest.mark.parametrize("scale", [0.125, 0.1])  # products with the first are exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_scores_that_float32_cannot_tell_from_their_neighbours(isa, dtype, scale, queries, size, use_isa):
    """Beside the largest score the others are nothing, whichever way they go along the keys."""
    use_isa(isa)
    v = torch.randn(1, 2, 96, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = torch.full((1, 2, queries, 64), size).to(dtype)
    for order in (1, -1):
        k = (torch.arange(96) * order / 128).to(dtype)[None, None, :, None].expand(1, 2, 96, 64).contiguous()
        asked = {"scale": scale, "causal": True, "causal_offset": 96 - queries}
        expected = dense.eager(q.double(), k.double(), v.double(), **asked)
        got = torch.ops.gcu.attention(q, k, v, **asked)
        torch.testing.assert_close(got.double(), expected, **tolerance(dtype, 96))


@pytest.mark.parametrize("queries", [1, 4, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if "amx" not in isa])  # whose weights may be 2^16
def test_sums_of_huge_values_do_not_overflow(isa, dtype, queries, use_isa):
    """Weights stay small where the largest score comes last."""
    use_isa(isa)
    source = torch.Generator().manual_seed(0)
    q, k = torch.ones(1, 2, queries, 64).to(dtype), torch.zeros(1, 2, 200, 64).to(dtype)
    k[:, :, 100:] = 1.25  # scores of 0, then of 10
    v = (torch.randn(1, 2, 200, 64, generator=source).abs() * 1e35).to(dtype)
    got = torch.ops.gcu.attention(q, k, v, scale=1 / 8)
    expected = dense.eager(q.double(), k.double(), v.double(), scale=1 / 8)
    torch.testing.assert_close(got.double(), expected, **tolerance(dtype, 200))


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("queries", [1, 4, 150, 700])
@pytest.mark.parametrize("cache", ["float", "token_head"])
def test_scores_that_grow_or_fall_along_the_keys(isa, queries, cache, use_isa):
    """What was summed is brought down again and again, or what comes later is nothing beside it."""
    use_isa(isa)
    batch = case([700], [queries], heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16, cache=cache, block_size=32)
    arguments = batch.arguments
    for sign in (1.0, -1.0):
        positions = torch.arange(700) * sign / 700
        key = torch.ones(64).bfloat16()
        for i, block in enumerate(arguments["block_table"][0, :22].tolist()):
            along = positions[i * 32 : (i + 1) * 32]
            cells = arguments["k_cache"][block, :, : len(along)]
            if cache == "float":
                cells[:] = along[:, None].bfloat16() * key
            else:
                cells[:] = 1
                arguments["k_scale"][block, :, : len(along)] = along
        arguments["q"] = (torch.ones(queries, 4, 64) * 20).bfloat16()
        got = torch.ops.gcu.paged_attention(**arguments)
        expected = paged.eager(**double(arguments))
        torch.testing.assert_close(got.double(), expected, **tolerance(torch.bfloat16, 700))
