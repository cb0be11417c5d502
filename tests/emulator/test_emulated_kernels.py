"""The hand-written Triton kernels through `torch.ops.gcu.*` on an emulated card: every launch is checked with its own
tile sizes, and the result is that of the CPU."""

import pytest
import torch
from emulated import on_card

import gcu_compile.kernels.attention
import gcu_compile.kernels.dequant_gemm
import gcu_compile.kernels.sampling  # noqa: F401

pytest.importorskip("triton")


def compare(name, arguments, options=None, exact=False, written=(), length=64):
    """Run an operation on both devices; the card's by its Triton kernel, without a fallback."""
    from gcu_compile.kernels import registry
    from gcu_compile.kernels.tolerance import tolerance

    options = options or {}

    def to(device, values):
        return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]

    operation = getattr(torch.ops.gcu, name)
    on_cpu, on_device = to("cpu", arguments), to("gcu", arguments)
    expected = operation(*on_cpu, **options)
    registry.fallbacks.clear()
    before = registry.calls[name, "triton"]
    actual = operation(*on_device, **options)
    assert not registry.fallbacks, registry.fallbacks
    assert registry.calls[name, "triton"] == before + 1
    pairs = list(zip(actual, expected, strict=True)) if isinstance(actual, tuple) else [(actual, expected)]
    pairs += [(on_device[at], on_cpu[at]) for at in written]
    for mine, wanted in pairs:
        if mine is None:
            continue
        exactly = {"rtol": 0, "atol": 0}
        within = exactly if exact or not wanted.is_floating_point() else tolerance(wanted.dtype, length)
        torch.testing.assert_close(mine.cpu(), wanted, **within)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@on_card
def test_sample_alone_and_shared():
    x = randn(3, 20011).bfloat16()
    for rows in (1, 3):
        asked = [torch.ones(rows), torch.full((rows,), 50).int(), torch.full((rows,), 0.9)]
        compare("sample", [x[:rows], torch.arange(rows), torch.arange(rows), *asked], exact=True)


@on_card
def test_scores_and_drafts_with_probabilities():
    x, rows = randn(2, 3001).bfloat16(), torch.arange(2)
    chain = [torch.full((2,), 0.8), None, torch.full((2,), 0.9)]
    for normalised in (True, False):
        compare("logprobs", [x, torch.tensor([[5, 7], [9, 11]]), 3, normalised, *chain], length=3001)
    q = (x.float() + randn(2, 3001, seed=1)).softmax(-1)
    drafts = [x, q.argmax(-1), torch.tensor([0, 2]), torch.tensor([1]), rows, rows, 2, q]
    compare("rejection_sample", [*drafts, *chain], exact=True)


def tables():
    return torch.tensor([[2, 0], [1, 3]]).int(), torch.tensor([0, 3, 4]).int(), torch.tensor([19, 30]).int()


@on_card
def test_paged_attention():
    from gcu_compile.kernels import registry
    from gcu_compile.kernels.tolerance import tolerance
    from gcu_compile.kernels.triton.paged_attention import key_cache

    q, k, v = randn(4, 4, 32), randn(5, 2, 16, 32, seed=1), randn(5, 2, 16, 32, seed=2)
    expected = torch.ops.gcu.paged_attention(q, k, v, *tables(), scale=0.2)
    stored = key_cache(*k.shape, k.dtype, "gcu")
    stored.copy_(k.to("gcu"))
    registry.fallbacks.clear()
    actual = torch.ops.gcu.paged_attention(
        q.to("gcu"), stored, v.to("gcu"), *(x.to("gcu") for x in tables()), scale=0.2
    )
    assert not registry.fallbacks
    torch.testing.assert_close(actual.cpu(), expected, **tolerance(torch.float32, 32))


@on_card
def test_a_key_cache_of_the_wrong_layout_falls_back_and_says_so():
    from gcu_compile.kernels import registry

    registry.fallbacks.clear()
    arguments = [randn(4, 4, 32), randn(5, 2, 16, 32, seed=1), randn(5, 2, 16, 32, seed=2), *tables()]
    torch.ops.gcu.paged_attention(*(x.to("gcu") for x in arguments), scale=0.2)
    ((name, reason),) = registry.fallbacks
    assert name == "paged_attention" and "key_cache" in reason


def latents():
    q, cache = randn(4, 4, 40), randn(5, 16, 72, seed=1)
    up_k, up_v = randn(4, 32, 64, seed=2) * 0.1, randn(4, 64, 24, seed=3) * 0.1
    return [q, cache, up_k, up_v, *tables()], {"scale": 0.2}


@on_card
def test_mla_attention():
    compare("mla_attention", *latents(), length=72)


@on_card("gcu400")
def test_mla_attention_on_gcu400():
    compare("mla_attention", *latents(), length=72)


@on_card
def test_attention():
    q, k, v = randn(1, 4, 70, 32), randn(1, 2, 90, 32, seed=1), randn(1, 2, 90, 32, seed=2)
    compare("attention", [q, k, v], {"scale": 0.2, "causal": True, "causal_offset": 20}, length=90)


@on_card
def test_rope_and_cache_and_write_kv():
    caches = [torch.zeros(5, 2, 16, 32) for _ in "kv"]
    slots = torch.tensor([3, -1, 40, 79])
    qkv = randn(4, 8 * 32)
    compare("rope_and_cache", [qkv, randn(9, 32, seed=1), torch.arange(4), slots, *caches], written=(4, 5))
    compare("write_kv", [randn(4, 2, 32), randn(4, 2, 32, seed=1), slots, *caches], written=(3, 4), exact=True)


@on_card
def test_quantised_products():
    from gcu_compile.kernels.dequant_gemm import layouts

    x, scales = randn(5, 128), randn(2, 40, seed=1).abs() * 0.1
    codes = torch.arange(40 * 128).view(40, 128) * 7
    four = layouts.pack(codes % 16, layouts.get("gptq_int4"))
    compare("dequant_gemm", [x, four, scales], {"layout": "gptq_int4"}, length=128)
    eight = layouts.pack(codes % 256 - 128, layouts.get("int8_columns"))
    compare("int8_gemm", [x, eight, scales[:1]], {"layout": "int8_columns"}, exact=True)
    compare("quantize_per_token", [x, 32, False], exact=True)


@on_card("gcu400")
def test_the_tiles_of_gcu400_too():
    for test in (test_sample_alone_and_shared, test_paged_attention, test_attention, test_quantised_products):
        test.__wrapped__()
