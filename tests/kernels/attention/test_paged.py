"""Meanings of the paged operations against the dense one, and their bad arguments by name."""

import pytest
import torch
from paged_case import case, double

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels.attention import dense, mla, paged
from gcu_compile.kernels.tolerance import tolerance

LENS, QUERIES = [1, 33, 0, 17, 48, 5], [1, 33, 0, 1, 7, 0]


def expected(batch, q=None, **settings):
    """Sequence by sequence through the dense meaning."""
    a = batch.arguments
    q = (a["q"] if q is None else q).double()
    output = torch.zeros(*q.shape[:2], batch.values[0].shape[-1], dtype=torch.float64)
    for i, (k, v) in enumerate(zip(batch.keys, batch.values, strict=True)):
        begin, end = a["query_start_loc"][i : i + 2].tolist()
        output[begin:end] = dense.eager(
            *(x.unsqueeze(0).double() for x in (q[begin:end].transpose(0, 1), k, v)),
            scale=a["scale"],
            causal_offset=k.shape[1] - (end - begin),
            **{"causal": True, **settings},
        )[0].transpose(0, 1)
    return output


CACHES = [("float", False), *((kind, zero) for kind in ("tensor", "head", "token_head") for zero in (False, True))]


@pytest.mark.parametrize(("cache", "zero"), CACHES)
@pytest.mark.parametrize("settings", [{}, {"window": 6}, {"causal": False}, {"soft_cap": 2.0}])
def test_paged_meaning_is_the_dense_one_per_sequence(cache, zero, settings):
    batch = case(LENS, QUERIES, cache=cache, zero=zero, padding=3, v_dim=24)
    got = torch.ops.gcu.paged_attention(**batch.arguments, **settings)
    torch.testing.assert_close(got, expected(batch, **settings), **tolerance(torch.float64, 64))
    assert not got[-3:].any()


def test_alibi_and_sinks():
    batch = case(LENS, QUERIES)
    asked = {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0]), "sinks": torch.tensor([0.0, 1.0, -1.0, 2.0])}
    got = paged.eager(**batch.arguments, **asked)
    torch.testing.assert_close(got, expected(batch, **asked), **tolerance(torch.float64, 64))


@pytest.mark.parametrize("cache", ["tensor", "head", "token_head"])
def test_error_of_an_int8_cache_is_bounded_by_its_step(cache):
    """A score moves by at most sum |q| * step / 2, an output by the weights' change and half a step of v."""
    exact, batch = case(LENS, QUERIES), case(LENS, QUERIES, cache=cache)
    a, b = paged.eager(**exact.arguments), paged.eager(**batch.arguments)
    step_k, step_v = (batch.arguments[f"{n}_scale"].max().item() / 2 for n in "kv")
    moved = batch.arguments["q"].abs().sum(-1).max().item() * batch.arguments["scale"] * step_k
    largest = exact.arguments["v_cache"].abs().max().item()
    # |softmax(s + d) - softmax(s)|_1 <= exp(2 max|d|) - 1
    assert (a - b).abs().max() <= step_v * 1.001 + largest * (torch.tensor(2 * moved).exp().item() - 1)
    assert (a - b).abs().max() > 0


def test_output_quantised_per_token():
    batch = case(LENS, QUERIES, padding=2)
    whole = paged.eager(**batch.arguments)
    values, scale = torch.ops.gcu.paged_attention_int8(**batch.arguments)
    assert values.dtype == torch.int8 and scale.shape == (whole.shape[0], 1)
    assert ((values.double() * scale.double().unsqueeze(-1) - whole).abs() <= scale.unsqueeze(-1) * 0.5001).all()
    assert (values.flatten(1).abs().amax(1)[:-2] == 127).all() and (scale[-2:] == 1).all()


def test_mla_meaning_is_attention_on_decompressed_keys():
    rank, rope, nope, heads, v_dim = 24, 8, 16, 3, 20
    batch = case(LENS, QUERIES, heads=heads, kv_heads=1, head_dim=rank + rope)
    a = batch.arguments
    source = torch.Generator().manual_seed(5)
    shapes = (heads, nope, rank), (heads, rank, v_dim), (a["q"].shape[0], heads, nope + rope)
    w_uk, w_uv, q = (torch.randn(s, generator=source, dtype=torch.float64) * 0.3 for s in shapes)
    tables = a["block_table"], a["query_start_loc"], a["seq_lens"]
    got = torch.ops.gcu.mla_attention(q, a["k_cache"].squeeze(1), w_uk, w_uv, *tables, scale=a["scale"])
    latents = [k[0, :, :rank] for k in batch.keys]
    shared = [k[:, :, rank:].expand(heads, -1, -1) for k in batch.keys]
    batch.values = [x @ w_uv for x in latents]
    batch.keys = [torch.cat([x @ w_uk.transpose(1, 2), s], -1) for x, s in zip(latents, shared, strict=True)]
    torch.testing.assert_close(got, expected(batch, q), **tolerance(torch.float64, 64))
    absorbed = torch.cat([torch.einsum("thn,hnr->thr", q[..., :nope], w_uk), q[..., nope:]], -1)
    again = paged.eager(absorbed, a["k_cache"], a["k_cache"][..., :rank], *tables, scale=a["scale"])
    torch.testing.assert_close(
        got, torch.einsum("thr,hrv->thv", again, w_uv), **tolerance(torch.float64, 64)
    )


def test_fakes_have_the_metadata_of_the_meanings():
    batch = case(LENS, QUERIES, dtype=torch.bfloat16, v_dim=24)
    a = list(batch.arguments.values())[:6]
    for op in (paged.OP, paged.OP_INT8, mla.OP):
        given = a if op is not mla.OP else [
            a[0], a[1][:, 0], torch.ones(4, 16, 16).bfloat16(), torch.ones(4, 16, 5).bfloat16(), *a[3:]
        ]  # fmt: skip
        meant, faked = op.eager(*given, scale=1.0), op.fake(*given, scale=1.0)
        for x, y in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (meant, faked)), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 4)}, r"q is torch.float32 \(3, 4\)"),
        ({"k_cache": torch.ones(9, 2, 24, 32)}, "k_cache's block size is 24, expected a power of two from 1 to 256"),
        ({"k_cache": torch.ones(9, 2, 16, 32, dtype=torch.int16)}, "k_cache's dtype is torch.int16"),
        ({"k_cache": torch.ones(9, 2, 16, 31)}, "k_cache's head size is 31, expected q's, 32"),
        ({"v_cache": torch.ones(9, 2, 32, 32)}, r"v_cache is torch.float32 \(9, 2, 32, 32\)"),
        ({"k_cache": torch.ones(9, 3, 16, 32), "v_cache": torch.ones(9, 3, 16, 32)}, "q's heads is 4"),
        ({"k_cache": torch.ones(9, 2, 16, 32, dtype=torch.int8), "v_cache": torch.ones(9, 2, 16, 32,
          dtype=torch.int8)}, "k_scale is None, expected a tensor"),
        ({"k_scale": torch.ones(1)}, "expected torch.int8, since a scale"),
        ({"seq_lens": torch.tensor([1, 33, 0, 17, 48, 5])}, "seq_lens's dtype is torch.int64"),
        ({"query_start_loc": torch.zeros(4, dtype=torch.int32)}, r"query_start_loc is \(4,\), expected \[7\]"),
        ({"query_start_loc": torch.tensor([0, 1, 34, 33, 35, 42, 42], dtype=torch.int32)}, "do not descend"),
        ({"query_start_loc": torch.tensor([0, 1, 34, 34, 35, 42, 50], dtype=torch.int32)}, "from 0 to 42"),
        ({"seq_lens": torch.tensor([1, 33, -1, 17, 48, 5], dtype=torch.int32)}, r"seq_lens\[2\] is -1"),
        ({"seq_lens": torch.tensor([1, 31, 0, 17, 48, 5], dtype=torch.int32)}, "at least the sequence's 33 queries"),
        ({"seq_lens": torch.tensor([1, 33, 0, 17, 4800, 5], dtype=torch.int32)}, "at most 5 blocks of 16"),
        ({"block_table": torch.full((6, 5), 99, dtype=torch.int32)}, r"block_table\[0\]\[0\] is 99, expected a block"),
        ({"window": 0}, "window is 0"),
        ({"sinks": torch.ones(2)}, r"sinks is \(2,\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, message):
    batch = case(LENS, QUERIES, dtype=torch.float32)
    with pytest.raises(InvalidInputError, match="gcu::paged_attention: .*" + message):
        torch.ops.gcu.paged_attention(**{**batch.arguments, **change})


def test_stale_entries_before_the_window_are_not_read():
    batch = case([100], [1])
    whole = paged.eager(**batch.arguments, window=20)
    batch.arguments["block_table"][0, :5] = -1
    assert torch.equal(paged.eager(**batch.arguments, window=20), whole)
    assert double(batch.arguments)["q"].dtype == torch.float64
