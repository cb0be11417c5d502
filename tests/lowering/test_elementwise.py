"""Norms, gated activations and rotary embeddings are recognised in every spelling, and Inductor fuses them."""

import pytest
import torch
import torch.nn.functional as F
from lowered import check, statuses

from gcu_compile import backend


def hf_rms(x, w, eps=1e-6):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


NORMS = {
    "hf": hf_rms,
    "gemma": lambda x, w: hf_rms(x, 1.0 + w),
    "x * x": lambda x, w: x * (1 / torch.sqrt((x * x).mean(-1, True) + 1e-6)) * w,
    "divided": lambda x, w: x / torch.sqrt((x * x).mean(-1, True) + 1e-6) * w,
    "power": lambda x, w: x * ((x**2).mean(-1, True) + 1e-6) ** -0.5 * w,
    "sum": lambda x, w: x * torch.rsqrt((x * x).sum(-1, True) / 32 + 1e-6) * w,
}


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_rms_norm(name, symbolic):
    x, w = torch.randn(3, 5, 32), torch.randn(32)
    _, report = check(NORMS[name], x, w, symbolic=symbolic, dims=(1,) if name != "sum" else ())
    assert report.fused["rms_norm"] == 1, statuses(report, "rms_norm")
    (match,) = [m for m in report.matches if m.rule == "rms_norm"]
    assert match.by == "inductor"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_of_torch(dtype):
    x, w = torch.randn(3, 5, 32, dtype=dtype), torch.randn(32, dtype=dtype)
    torch.compiler.reset()
    torch.compile(lambda x, w: F.rms_norm(x, (32,), w, 1e-6), backend="gcu", options={"inductor": False})(x, w)
    assert backend.reports[-1].fused["rms_norm"] == 1, backend.reports[-1].matches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_layer_norm(dtype):
    x, w = torch.randn(3, 5, 32, dtype=dtype), torch.ones(32, dtype=dtype)
    _, report = check(hf_rms, x, w)
    assert report.fused["rms_norm"] == 1
    _, report = check(lambda x, w: F.layer_norm(x, (32,), w, w), x, w)
    assert report.fused["layer_norm"] == 1 and not report.fused["rms_norm"]


def test_what_is_with_the_norm_is_told():
    def quantised(x, r, w):
        y = hf_rms(x + r, w)
        scale = y.abs().amax(-1, True) / 127
        return (y / scale).round().clamp(-128, 127).to(torch.int8).float()

    x = torch.randn(3, 32)
    _, report = check(quantised, x, x.flip(0), torch.ones(32), scale=256.0)
    assert statuses(report, "rms_norm") == [("fused", "after the residual's add, then quantised")]
    _, report = check(lambda x, w: hf_rms(x.view(3, 4, 8), w[:8]), x, torch.ones(32))
    assert statuses(report, "rms_norm") == [("fused", "of each head")]


@pytest.mark.parametrize(
    "fn, reason",
    [
        (lambda x, w: x * torch.rsqrt((x * x).mean(-2, True) + 1e-6), "not the last one"),
        (lambda x, w: x * torch.rsqrt((w * w).mean(-1, True) + 1e-6), "all but the arguments of aten.mul.Tensor"),
        (lambda x, w: x * torch.rsqrt((x * x).amax(-1, True) + 1e-6), None),
    ],
)
def test_near_miss_of_a_norm(fn, reason):
    _, report = check(fn, torch.randn(3, 32), torch.randn(3, 32))
    found = statuses(report, "rms_norm")
    assert not report.fused["rms_norm"] and (reason is None or any(reason in why for _, why in found)), found


GATES = {
    "silu": lambda g, u: F.silu(g) * u,
    "silu spelled": lambda g, u: g * torch.sigmoid(g) * u,
    "gelu": lambda g, u: F.gelu(g) * u,
    "gelu tanh": lambda g, u: u * F.gelu(g, approximate="tanh"),
    "relu": lambda g, u: F.relu(g) * u,
    "one tensor": lambda g, u: F.silu(torch.cat([g, u], -1).chunk(2, -1)[0]) * torch.cat([g, u], -1).chunk(2, -1)[1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATES)
def test_gated_activation(name, dtype):
    g, u = torch.randn(2, 3, 16, dtype=dtype)
    _, report = check(GATES[name], g, u)
    assert report.fused["gated_activation"] == 1, statuses(report, "gated_activation")


def test_no_gate_is_no_gated_activation():
    g = torch.randn(3, 16)
    for fn in (lambda g: F.silu(g), lambda g: F.silu(g) * 2, lambda g: torch.sigmoid(g) * torch.tanh(g)):
        _, report = check(fn, g)
        assert not report.fused["gated_activation"]


def halves(x):
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def hf_rotary(x, cos, sin):
    one, two = halves(x)
    return x * torch.cat([cos, cos], -1) + torch.cat([-two, one], -1) * torch.cat([sin, sin], -1)


def vllm_rotary(x, cos, sin):
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def interleaved(x, cos, sin):
    one, two = x[..., ::2], x[..., 1::2]
    return torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)


@pytest.mark.parametrize("fn", [hf_rotary, vllm_rotary, interleaved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary(fn, dtype):
    x = torch.randn(2, 4, 5, 16, dtype=dtype)
    cos, sin = torch.rand(2, 5, 8, dtype=dtype)
    _, report = check(fn, x, cos, sin)
    assert report.fused["rotary"] == 1, report.matches


def test_rotary_of_vllm_splits_q_and_k_once_per_use():
    """As vLLM's pieces have it: the fused projection is split, and viewed as heads, anew for each half."""

    def fn(qkv, cos, sin):
        def part(number, heads, half):
            return qkv.split([32, 16, 16], -1)[number].reshape(qkv.shape[0], heads, 16).split(8, -1)[half]

        turned = []
        for number, heads in ((0, 2), (1, 1)):
            one, two = part(number, heads, 0), part(number, heads, 1)
            c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
            turned.append(torch.cat([one * c - two * s, two * cos.unsqueeze(-2) + one * sin.unsqueeze(-2)], -1))
        return torch.cat(turned, 1)

    for dtype in (torch.float32, torch.bfloat16):
        for symbolic in (False, True):
            cos, sin = torch.rand(2, 5, 8, dtype=dtype)
            _, report = check(fn, torch.randn(5, 64, dtype=dtype), cos, sin, symbolic=symbolic, dims=(0,))
            assert statuses(report, "rotary") == [("fused", "")] * 2


def test_rotary_of_another_tensor_is_a_near_miss():
    x, cos = torch.randn(2, 4, 5, 16), torch.rand(5, 16)
    _, report = check(lambda x, c: x * c + torch.cat([-(x * 2)[..., 8:], (x * 2)[..., :8]], -1) * c, x, cos)
    assert statuses(report, "rotary") == [("near_miss", "what is rotated is not what is multiplied by the cosine")]


def test_inductor_makes_one_kernel_of_residual_norm_and_quantisation():
    def fn(x, r, w):
        y = hf_rms(x + r, w)
        return (y / (y.abs().amax(-1, True) / 127)).round().clamp(-128, 127).to(torch.int8), x + r

    x = torch.randn(4, 64)
    options = {"cache": False}
    torch.compile(fn, backend="gcu", options=options)(x, x.flip(0), torch.ones(64))
    assert backend.reports[-1].fused["rms_norm"] == 1
    assert len(backend.recordings[-1].kernels[0]) == 1
