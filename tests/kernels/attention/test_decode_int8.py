"""Decode of an int8 cache: few query rows, which a build for AMX turns into digits, at the edges of those."""

import pytest
import torch
from amx_emulation import EMULATED, ISAS
from paged_case import case, double

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import paged
from gcu_compile.kernels.tolerance import tolerance

CACHES = ["tensor", "head", "token_head"]


@pytest.fixture(params=[isa for isa in ISAS if isa in ("avx512", "amx", EMULATED)] or ISAS[-1:], autouse=True)
def isa(request, use_isa):
    use_isa(request.param)
    before = registry.calls["paged_attention", "host_cpp"]
    yield
    assert registry.calls["paged_attention", "host_cpp"] > before


def decode(length=300, queries=1, cache="token_head", **asked):
    asked = {"head_dim": 64, "dtype": torch.bfloat16, "cache": cache, **asked}
    return case([length, 5], [queries, 1], **asked).arguments


def check(arguments, length=300, scale=1.0):
    got = torch.ops.gcu.paged_attention(**arguments)
    limits = tolerance(torch.bfloat16, length, scale)
    torch.testing.assert_close(got.double(), paged.eager(**double(arguments)), **limits)
    return got


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("rows", range(1, 18))  # of one KV head; from 17 on they are packed
def test_every_number_of_rows(rows, zero):
    check(decode(heads=2 * rows, kv_heads=2, zero=zero))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sizes", [(1, 1), (33, 7), (65, 17), (100, 63), (128, 129), (192, 128), (256, 256)])
def test_odd_sizes(sizes, cache):
    check(decode(head_dim=sizes[0], v_dim=sizes[1], heads=6, cache=cache, zero=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 64), (192, 128), (256, 256)])
def test_every_code(sizes, rows):
    """Without zero points and in rows of whole 64 numbers, which are looked up in tables."""
    arguments = decode(heads=2 * rows, kv_heads=2, head_dim=sizes[0], v_dim=sizes[1], cache="tensor")
    for name in ("k_cache", "v_cache"):
        codes = arguments[name]
        codes.view(-1)[:] = torch.arange(codes.numel()).to(torch.int8)
        assert codes.unique().numel() == 256
        codes.copy_(codes[..., torch.randperm(codes.shape[-1])])
    check(arguments)


@pytest.mark.parametrize("size", [12, 90, 150, 208])  # rounded to 32 they are no multiple of 64
def test_the_most_rows_of_several_heads(size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # which has no need to share the heads out
    check(decode(heads=48, kv_heads=3, head_dim=size, zero=True))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_tiles(length):
    for block_size in (1, 8, 16, 32):
        check(decode(length, block_size=block_size))


@pytest.mark.parametrize("queries", [2, 4])
@pytest.mark.parametrize("extra", [{"window": 1}, {"window": 70}, {"soft_cap": 2.0}, {"causal": False}])
def test_options(extra, queries):
    arguments = decode(queries=queries, zero=True) | extra
    arguments |= {"sinks": torch.randn(4), "alibi_slopes": torch.rand(4) * 0.3}
    check(arguments)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_values_of_extreme_scales(size, cache):
    arguments = decode(cache=cache)
    arguments["v_scale"] = arguments["v_scale"] * size
    check(arguments, scale=size)


@pytest.mark.parametrize("size", [1e-20, 1e-4, 1e4, 1e20])
def test_queries_of_extreme_sizes_with_scales_that_undo_them(size):
    arguments = decode()
    arguments["q"] = (arguments["q"].double() * size).bfloat16()
    arguments["k_scale"] = arguments["k_scale"] / size
    check(arguments)


@pytest.mark.parametrize("zero", [False, True])
def test_queries_whose_sum_float32_does_not_hold(zero):
    arguments = decode(cache="tensor", zero=zero) | {"k_scale": torch.ones(1), "scale": 2e-38}
    arguments["q"][:] = 1e37  # 64 of them are 6e38, while the products with these keys nearly cancel
    keys = arguments["k_cache"]
    keys[..., ::2], keys[..., 1::2] = 20, -20
    keys[..., 0] += torch.arange(16, dtype=torch.int8)
    if zero:
        keys += 7
        arguments["k_zero_point"][:] = 7
    check(arguments)


def test_a_large_number_of_a_query_leaves_the_others_their_places():
    arguments = decode()
    arguments["q"][..., 5] = 3000
    arguments["k_cache"][..., 5] = 0
    check(arguments)


def test_small_weights_beside_a_large_one_keep_their_sum():
    """One key weighs as much as the other 4000 together, in whichever of the blocks it is."""
    for at in (0, 77, 3999):
        arguments = decode(4000, heads=1, kv_heads=1, cache="tensor", block_size=32)
        arguments["q"][:] = 1
        arguments["k_cache"][:] = 0
        block = arguments["block_table"][0, at // 32]
        arguments["k_cache"][block, 0, at % 32] = 127
        arguments["k_scale"] = torch.tensor([8.3 / 127 / 8])  # e^8.3 = 4024
        check(arguments, 4000)


@pytest.mark.parametrize("stored,point", [(-128, -128), (127, -128), (-128, 127), (127, 127)])
def test_zero_points_at_the_ends(stored, point):
    arguments = decode(zero=True)
    for name in "kv":
        arguments[f"{name}_cache"][:, :, ::2] = stored
        arguments[f"{name}_zero_point"][:] = point
    check(arguments)


def test_negative_scales():
    arguments = decode()
    for name in "kv":
        arguments[f"{name}_scale"][:, :, ::3] *= -1
    check(arguments)


def test_nan_of_a_query_stays_in_its_row_and_of_a_slot_that_is_not_read_nowhere():
    arguments = decode(zero=True)
    clean = check(arguments)
    for name in "kv":
        scale, table = arguments[f"{name}_scale"], arguments["block_table"]
        unread = torch.ones(scale.shape, dtype=torch.bool)
        for row, length in zip(table, arguments["seq_lens"].tolist(), strict=True):
            for token in range(length):
                unread[row[token // 16], :, token % 16] = False
        scale[unread.expand_as(scale)] = torch.nan
    assert torch.equal(torch.ops.gcu.paged_attention(**arguments), clean)
    arguments["q"][0, 1, 3] = torch.nan
    got = torch.ops.gcu.paged_attention(**arguments)
    assert got[0, 1].isnan().all() and got.isnan().sum() == 64
    got[0, 1] = clean[0, 1]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("token", [0, 130, 299])
def test_nan_of_a_scale_is_not_hidden(name, token):
    arguments = decode(head_dim=32)
    arguments[name][arguments["block_table"][0, token // 16], 1, token % 16] = torch.nan
    got = torch.ops.gcu.paged_attention(**arguments)
    assert got[0, 2:].isnan().all() and not got[0, :2].isnan().any() and not got[1].isnan().any()
