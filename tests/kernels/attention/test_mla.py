"""`gcu::mla_attention`: the host kernel against the meaning in float64, absorbed and decompressed; bad arguments."""

import pytest
import torch
from amx_emulation import ISAS
from covering import pairwise
from paged_case import case

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import mla
from gcu_compile.kernels.host import mla as host
from gcu_compile.kernels.tolerance import tolerance

LENS = {
    "decode": ([17, 1, 128, 300], [1, 1, 1, 1]),
    "verify": ([17, 5, 300], [4, 5, 3]),
    "prefill": ([1, 33, 130], [1, 33, 130]),
    "mixed": ([1, 33, 0, 17, 48, 5, 310], [1, 33, 0, 1, 7, 0, 150]),
}
# rank, rope, nope, v_dim; the third makes keys and values from 22 queries on, the last never does.
SIZES = [(512, 64, 128, 128), (64, 8, 16, 16), (96, 20, 16, 20), (32, 0, 24, 40), (24, 8, 0, 48)]
ROWS = pairwise(
    {
        "isa": ISAS,
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "sizes": SIZES,
        "heads": [1, 4, 16, 100],
        "block_size": [1, 16, 64, 128],
        "lens": list(LENS),
        "causal": [True, False],
        "padding": [0, 3],
    }
)


def batch(lens, queries, sizes, heads=4, dtype=torch.float64, **asked):
    """Arguments of `gcu::mla_attention`, whose keys and values are of size 1 like latents."""
    rank, rope, nope, v_dim = sizes
    a = case(lens, queries, heads=heads, kv_heads=1, head_dim=rank + rope, dtype=dtype, **asked).arguments
    source = torch.Generator().manual_seed(5)
    shapes = (heads, nope, rank), (heads, rank, v_dim), (a["q"].shape[0], heads, nope + rope)
    w_uk, w_uv, q = (torch.randn(s, generator=source, dtype=torch.float64) for s in shapes)
    given = [q, a["k_cache"].squeeze(1), w_uk / rank**0.5, w_uv / rank**0.5]
    tables = [a["block_table"], a["query_start_loc"], a["seq_lens"]]
    return [x.to(dtype) for x in given] + tables, {"scale": (nope + rope) ** -0.5}


def double(given):
    return [x.double() if x.is_floating_point() else x for x in given]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())).replace("torch.", ""))
def test_covering_array(row, use_isa):
    use_isa(row["isa"])
    names = ("heads", "dtype", "block_size", "padding")
    given, asked = batch(*LENS[row["lens"]], row["sizes"], **{name: row[name] for name in names})
    before = registry.calls["mla_attention", "host_cpp"]
    got = torch.ops.gcu.mla_attention(*given, **asked, causal=row["causal"])
    assert registry.calls["mla_attention", "host_cpp"] == before + 1
    expected = mla.eager(*double(given), **asked, causal=row["causal"])
    length = max(sum(row["sizes"][:2]), max(LENS[row["lens"]][0]))
    torch.testing.assert_close(got.double(), expected, **tolerance(row["dtype"], length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_mean_the_same(dtype, monkeypatch):
    """Each way for every sequence, and heads in groups."""
    given, asked = batch(*LENS["mixed"], SIZES[1], dtype=dtype)
    expected = mla.eager(*double(given), **asked)
    for least in (0, 1, 8, float("inf")):
        monkeypatch.setattr(host, "fewest_decompressed", lambda *sizes, least=least: least)
        for most in (1, 1 << 16, 1 << 30):
            monkeypatch.setattr(host, "MOST_BYTES", most)
            got = torch.ops.gcu.mla_attention(*given, **asked)
            torch.testing.assert_close(got.double(), expected, **tolerance(dtype, 310))


def test_the_way_that_multiplies_less_is_taken():
    rank, nope, v_dim, rope, keys = 512, 128, 128, 64, 1000
    assert 170 < host.fewest_decompressed(rank, nope, v_dim) < 171
    for queries in (170, 171):
        absorbed = queries * keys * (2 * rank + rope)
        decompressed = queries * keys * (nope + rope + v_dim) + keys * rank * (nope + v_dim)
        assert (decompressed < absorbed) == (queries > 170)
    assert host.fewest_decompressed(16, 16, 16) == float("inf")


BAD = {
    "q": (0, torch.ones(3, 4), r"q is torch.float32 \(3, 4\)"),
    "latent": (1, torch.ones(9, 1, 16, 72), "latent_cache is"),
    "block size": (1, torch.ones(9, 24, 72), "latent_cache's block size is 24, expected a power of two"),
    "latent size": (1, torch.ones(9, 16, 71), "latent_cache's last size is 71, expected rank 64"),
    "dtype": (1, torch.ones(9, 16, 72).half(), "latent_cache's dtype is torch.float16, expected q's"),
    "w_uk": (2, torch.ones(3, 16, 64), "w_uk is"),
    "w_uv": (3, torch.ones(4, 63, 16), "w_uv is"),
    "table": (4, torch.full((3, 21), 99, dtype=torch.int32), r"block_table\[0\]\[0\] is 99, expected a block"),
    "starts": (5, torch.tensor([0, 4, 2, 12], dtype=torch.int32), "do not descend"),
    "lengths": (6, torch.tensor([17, -5, 300], dtype=torch.int32), r"seq_lens\[1\] is -5"),
    "long": (6, torch.tensor([17, 5, 30000], dtype=torch.int32), "at most 21 blocks"),
    "int64": (6, torch.tensor([17, 5, 300]), "seq_lens's dtype is torch.int64"),
}


@pytest.mark.parametrize("decompressed", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what, decompressed, monkeypatch):
    given, asked = batch(*LENS["verify"], SIZES[1], dtype=torch.float32)
    at, bad, message = BAD[what]
    if decompressed:
        monkeypatch.setattr(host, "fewest_decompressed", lambda *sizes: 0)
    for call in (torch.ops.gcu.mla_attention, mla.eager):
        with pytest.raises(InvalidInputError, match="gcu::mla_attention: .*" + message):
            call(*given[:at], bad, *given[at + 1 :], **asked)
