"""`gcu::attention`: its meaning against torch's SDPA, its fake, and bad arguments by name."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels.attention import dense
from gcu_compile.kernels.tolerance import tolerance

attention = torch.ops.gcu.attention


def inputs(batch=2, heads=6, kv_heads=2, q_len=7, kv_len=11, head_dim=16, v_dim=16, dtype=torch.float64, seed=0):
    source = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, q_len, head_dim), (batch, kv_heads, kv_len, head_dim), (batch, kv_heads, kv_len, v_dim)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
def test_meaning_is_torchs_sdpa(dtype, mask):
    q, k, v = inputs(dtype=dtype)
    keep = torch.rand(2, 1, 7, 11, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[1, 0, 3] = False  # one row that sees nothing
    bias = {"bool": keep, "float": torch.where(keep, 0.5, -torch.inf).to(dtype)}.get(mask)
    theirs = sdpa(q, k, v, bias, is_causal=mask == "causal", scale=0.3, enable_gqa=True)
    ours = dense.eager(q, k, v, bias, scale=0.3, causal=mask == "causal")
    torch.testing.assert_close(ours, theirs, **tolerance(dtype, 16))
    if bias is not None:
        assert not ours[1, :, 3].any() and not theirs[1, :, 3].any()


def test_soft_cap_alibi_sinks_and_window_follow_the_formula():
    """Against the formula written with loops, one score at a time."""
    q, k, v = inputs(q_len=4, kv_len=6, heads=4)
    slopes, sinks = torch.tensor([0.5, 0.25, 0.1, 0.0]).double(), torch.tensor([0.0, 1.0, -torch.inf, 3.0]).double()
    offset, window, cap = 2, 3, 1.5
    got = dense.eager(
        q, k, v, None, slopes, sinks, scale=0.4, causal=True, causal_offset=offset, window=window, soft_cap=cap
    )
    for b, h, i in itertools.product(range(2), range(4), range(4)):
        total, value = sinks[h].exp(), torch.zeros(16).double()
        for j in range(6):
            if i + offset - window < j <= i + offset:
                score = cap * ((q[b, h, i] @ k[b, h // 2, j]) * 0.4 / cap).tanh() + slopes[h] * (j - i - offset)
                total, value = total + score.exp(), value + score.exp() * v[b, h // 2, j]
        torch.testing.assert_close(got[b, h, i], value / total, **tolerance(torch.float64, 16))


def test_no_keys_and_no_queries():
    q, k, v = inputs(kv_len=0)
    assert not attention(q, k, v, scale=1.0).any()
    q, k, v = inputs(q_len=0)
    assert attention(q, k, v, scale=1.0).shape == (2, 6, 0, 16)


def test_operation_is_compiled_with_symbolic_sizes():
    def fn(q, k, v):
        return attention(q, k, v, scale=0.25, causal=True, causal_offset=k.shape[2] - q.shape[2]) * 2

    compiled = torch.compile(fn, backend="gcu", dynamic=True, fullgraph=True)
    for q_len in (3, 5):
        q, k, v = inputs(q_len=q_len, kv_len=q_len + 4, v_dim=24, dtype=torch.float32)
        assert compiled(q, k, v).shape == (2, 6, q_len, 24)
        torch.testing.assert_close(compiled(q, k, v), fn(q, k, v), **tolerance(torch.float32, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 4)}, r"q is \(3, 4\), expected four dimensions"),
        ({"k": torch.ones(2, 2, 11, 8).double()}, r"k is \(2, 2, 11, 8\), expected \[2, kv_heads, kv_len, 16\]"),
        ({"k": torch.ones(2, 2, 11, 16)}, "k's dtype is torch.float32"),
        ({"v": torch.ones(2, 2, 12, 16).double()}, r"v is \(2, 2, 12, 16\), expected \[2, 2, 11, v_dim\]"),
        ({"q": torch.ones(2, 5, 7, 16).double()}, "heads a multiple of k's 2"),
        ({"bias": torch.ones(3, 7, 11)}, r"broadcasts to \(2, 6, 7, 11\)"),
        ({"bias": torch.ones(11, dtype=torch.int32)}, "bias's dtype is torch.int32"),
        ({"sinks": torch.ones(2)}, r"sinks is \(2,\), expected \[6\]"),
        ({"alibi_slopes": torch.ones(7)}, r"alibi_slopes is \(7,\)"),
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(zip("qkv", inputs(), strict=True)) | {"scale": 1.0} | change
    with pytest.raises(InvalidInputError, match="gcu::attention: .*" + message):
        attention(**arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [1.5, -1.5, 0.0])
def test_a_soft_cap_in_a_tensor_is_the_formula(cap, dtype):
    q, k, v = inputs(dtype=dtype)
    tensor = torch.tensor(cap, dtype=torch.float64)
    wide = [x.double() for x in (q, k, v)]
    scores = (wide[0] @ wide[1].repeat_interleave(3, 1).mT) * 0.3
    expected = (cap * (scores / cap).tanh()).softmax(-1) @ wide[2].repeat_interleave(3, 1)
    got = attention(q, k, v, scale=0.3, soft_cap_tensor=tensor)
    torch.testing.assert_close(got.double(), expected, **tolerance(dtype, 16))
    with pytest.raises(InvalidInputError, match="soft_cap_tensor"):
        attention(q, k, v, scale=0.3, soft_cap_tensor=tensor, soft_cap=2.0)
    with pytest.raises(InvalidInputError, match="soft_cap_tensor"):
        attention(q, k, v, scale=0.3, soft_cap_tensor=tensor.view(1))
