"""Int8 weights whose scales follow the product, of integers or of floats: one operation, or the reason why not."""

import pytest
import torch
from spelled import FLOATS, K, N, data, fused, near_miss, run

from gcu_compile.kernels.tolerance import tolerance


def integers(x, weight, x_scale, scale):
    codes = (x / x_scale).round().clamp(-128, 127).to(torch.int8)
    return ((torch._int_mm(codes, weight.t()).float() * x_scale) * scale).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [(N,), (1, N), ()])
def test_integer_product_and_scales(dtype, scale):
    x, weight = torch.randn(33, K).to(dtype), (data()["codes"] - 8).to(torch.int8)
    x_scale = x.float().abs().amax(-1, keepdim=True) / 127
    matches, _ = run(integers, x, weight, x_scale, torch.rand(scale) / 8, rule="int8_gemm")
    assert [m.status for m in matches] == ["fused"], matches


def test_integer_product_without_scales_is_not_its_business():
    def fn(x, w):
        return torch._int_mm(x, w.t()).float()

    x = torch.randint(-8, 8, (33, K), dtype=torch.int8)
    assert run(fn, x, (data()["codes"] - 8).to(torch.int8), rule="int8_gemm")[0] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integer_product_near_miss_a_sum_that_a_dtype_may_not_hold(dtype):
    def fn(x, w, s):
        return torch._int_mm(x, w.t()).to(dtype) * s

    x = torch.randint(-8, 8, (33, K), dtype=torch.int8)
    args = fn, x, (data()["codes"] - 8).to(torch.int8), (torch.rand(N) / 8).to(dtype)
    if dtype == torch.float16:
        near_miss("the integer sum goes through torch.float16", *args, rule="int8_gemm")
    else:  # rounded once more than the operation does
        fused(*args, rule="int8_gemm")


def after(d, view=None, cast=None):
    """torchao's other spelling: scales on the product of unscaled codes."""
    weight = (d["codes"] - 8).to(torch.int8)

    def fn(x, weight, scales):
        product = torch.mm(x.reshape(-1, K), weight.t().to(x.dtype))
        if view is not None:
            product = product.view(*view, N)
        return product * (scales if cast is None else scales.to(cast))

    return fn, (d["x"], weight, d["scales"][0].contiguous())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("view", [None, (3, 1), (1, 1, 3)])
@pytest.mark.parametrize("shape", [(N,), (1, N), (), (1, 1)])
def test_scales_after_the_product(dtype, view, shape):
    fn, (x, weight, scales) = after(data(dtype), view)
    fused(fn, x, weight, scales.view(shape) if shape and shape[-1] == N else scales[:1].view(shape).clone())


def test_scales_after_the_product_of_a_weight_that_lies_by_inputs():
    d = data()

    def fn(x, weight, scales):
        return (x @ weight.to(x.dtype)) * scales

    fused(fn, d["x"], (d["codes"] - 8).to(torch.int8).T.contiguous(), d["scales"][0].contiguous())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("rule", ["noop_permute", ""])
def test_which_way_a_square_weight_lies(order, rule):
    """Whether or not a permutation of nothing was removed before."""
    from lowered import lowered

    weight, x, scales = (data()["codes"][:, :N] - 8).to(torch.int8), torch.randn(3, N), torch.rand(N) / 32

    def fn(x, weight, scales):
        return (x @ torch.permute(weight, order).to(x.dtype)) * scales

    gm, report = lowered(fn, x, weight, scales, disable_rules=[rule] if rule else [])
    assert report.fused["dequant_gemm"] == 1
    torch.testing.assert_close(gm(x, weight, scales), fn(x, weight, scales), **tolerance(torch.float32, N))


def test_scales_after_the_product_with_symbolic_rows():
    fn, (_, *rest) = after(data())
    x = torch.randn(5, K)
    torch._dynamo.mark_dynamic(x, 0)
    fused(fn, x, *rest)


def test_scales_after_the_product_near_misses():
    d = data()
    fn, args = after(d)
    near_miss("is no scale of outputs", fn, *args[:2], torch.rand(3, 1))
    fn, args = after(data(torch.bfloat16))
    near_miss("torch.bfloat16 is scaled to torch.float32", fn, *args[:2], args[2].float())

    def used(x, weight, scales):
        product = x @ weight.t().to(x.dtype)
        return product * scales + product

    near_miss("used before it is scaled", used, d["x"], *after(d)[1][1:])
    near_miss("scaled in another shape", after(d)[0], *after(d)[1][:2], torch.rand(2, 1, N))


@pytest.mark.parametrize("factor", [torch.tensor([0, 3] * (N // 2)), torch.tensor([True, False] * (N // 2))])
def test_near_miss_a_factor_that_is_no_scale(factor):
    fn, args = after(data())
    near_miss("which is no scale", fn, *args[:2], factor)


@pytest.mark.parametrize("cast", [torch.bool, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_codes_that_are_other_numbers_before_they_are_floats(cast):
    """int32 holds them all, and is left alone too."""
    d = data()

    def fn(x, weight, scales):
        return (x @ weight.t().to(cast).to(x.dtype)) * scales

    matches, _ = run(fn, d["x"], (d["codes"] - 8).to(torch.int8), d["scales"][0].contiguous())
    assert matches == []


def test_integer_product_near_miss_truncated_on_the_way():
    def fn(x, w, one, other):
        return (torch._int_mm(x, w.t()).float() * one).to(torch.int8).float() * other

    x, w = torch.randint(-8, 8, (33, K), dtype=torch.int8), (data()["codes"] - 8).to(torch.int8)
    args = fn, x, w, torch.rand(33, 1) / 64, torch.rand(N)
    matches, _ = run(*args, rule="int8_gemm")
    assert "fused" not in [m.status for m in matches]
    assert any("goes through torch.int8" in m.reason for m in matches), matches


def test_a_product_that_is_fused_where_a_larger_one_is_not():
    """A gated layer: the scaled sum is multiplied once more, by no scale."""

    def fn(x, w, x_scale, scale, gate):
        return (torch._int_mm(x, w.t()).float() * x_scale * scale) * gate

    x, w = torch.randint(-8, 8, (33, K), dtype=torch.int8), (data()["codes"] - 8).to(torch.int8)
    matches, _ = run(fn, x, w, torch.rand(33, 1), torch.rand(N), torch.rand(33, N), rule="int8_gemm")
    assert "fused" in [m.status for m in matches], matches


def test_a_scaled_product_of_floats_is_not_its_business():
    matches, _ = run(lambda x, w, s: (x @ w.t()) * s, torch.randn(3, K), torch.randn(N, K), torch.rand(N))
    assert matches == []


def test_scales_of_tokens_alone_are_not_a_near_miss_where_those_of_outputs_follow_a_cast():
    def fn(x, w, x_scale, scale):
        return (torch._int_mm(x, w.t()).float() * x_scale).bfloat16() * scale

    x, w = torch.randint(-8, 8, (33, K), dtype=torch.int8), (data()["codes"] - 8).to(torch.int8)
    matches, _ = run(fn, x, w, torch.rand(33, 1), (torch.rand(N) / 8).bfloat16(), rule="int8_gemm")
    assert [m.status for m in matches] == ["fused"], matches
