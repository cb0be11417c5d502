"""Attention in the encoders of images and sound: vLLM's operation with ours inside."""

import pytest
import torch

from gcu_compile.kernels.tolerance import tolerance

pytestmark = pytest.mark.vllm


@pytest.fixture
def wrappers(monkeypatch):
    """vLLM's module, ours put in; as it was afterwards."""
    from vllm.v1.attention.ops import vit_attn_wrappers

    from vllm_integration import vllm_private
    from vllm_integration.attention import encode

    monkeypatch.setattr(vit_attn_wrappers, "apply_sdpa", vit_attn_wrappers.apply_sdpa)
    vllm_private.replace_encoder_attention(encode)
    return vit_attn_wrappers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (6, 2, 80), (3, 1, 7)])
@pytest.mark.parametrize("starts", [None, [0, 1, 1, 40, 70]], ids=["batch", "packed"])
def test_equal_to_attention_in_float64(wrappers, dtype, scale, heads, kv_heads, size, starts):
    """A batch of one length, and sequences side by side, one of them empty."""
    batch, length = (2, 33) if starts is None else (1, 70)
    make = torch.Generator().manual_seed(size)
    q, k, v = (torch.randn(batch, length, n, size, generator=make).to(dtype) for n in (heads, kv_heads, kv_heads))
    ends = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    got = wrappers.vit_torch_sdpa_wrapper(q, k, v, scale, ends, enable_gqa=heads > kv_heads)
    parts = [(0, length)] if starts is None else list(zip(starts, starts[1:], strict=False))
    expected = []
    for begin, end in parts:
        wide = (x[:, begin:end].transpose(1, 2).double() for x in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(*wide, scale=scale, enable_gqa=True)
        expected.append(found.transpose(1, 2))
    torch.testing.assert_close(got.double(), torch.cat(expected, 1), **tolerance(dtype, max(length, size)))


def test_ours_runs_and_is_put_in_once(wrappers, monkeypatch):
    from vllm_integration import vllm_private

    first = wrappers.apply_sdpa
    vllm_private.replace_encoder_attention(lambda *given: pytest.fail("a second one"))
    assert wrappers.apply_sdpa is first
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: pytest.fail("torch's"))
    x = torch.ones(1, 5, 2, 16)
    assert torch.equal(wrappers.vit_torch_sdpa_wrapper(x, x, x), x)
