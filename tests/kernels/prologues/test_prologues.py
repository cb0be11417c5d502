"""Norm or activation with quantisation: codes and scales against float64, on every instruction set and in Triton."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensor, FakeTensorMode

import gcu_compile.kernels.prologues  # noqa: F401  (defines the operations)
from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import direct, registry
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host import prologues as host
from gcu_compile.kernels.prologues import eager
from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.kernels.triton import prologues as triton

F32, BF16, F16 = FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HERE = [isa for isa in build.available() if isa != "amx"]  # nothing here is a product of tiles
SIZES = (1, 2, 7, 16, 31, 33, 64, 100, 576, 1536, 4096)


def randn(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_arguments(rows, size, dtype, residual, weight_dtype=F32, seed=0):
    other = randn(rows, size, seed=seed + 1, dtype=dtype) if residual else None
    return randn(rows, size, seed=seed, dtype=dtype) * 3, other, randn(size, seed=seed + 2).to(weight_dtype), 1e-6


def check_codes(codes, scales, exact):
    """Codes and scales of rows whose values are `exact` (float64): each code is a nearest one, by the scale's rounding
    and that of a float32 on its way."""
    allowed = tolerance(F32, exact.shape[-1])["rtol"]
    meant = exact.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(scales.double(), meant, rtol=allowed, atol=0.0)
    steps = exact / meant.clamp(min=1e-300)
    assert ((codes.double() - steps).abs() <= 0.5 + 127 * allowed).all()


def check_norm(run, arguments):
    x, residual, weight, eps = arguments
    codes, scales, total = run(*arguments)
    s = x.double() if residual is None else x.double() + residual.double()
    exact = s / (s.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    check_codes(codes, scales, exact)
    assert codes.dtype == torch.int8 and scales.dtype == F32 and scales.shape == (*x.shape[:-1], 1)
    if residual is None:
        assert total.shape == (0,) and total.dtype == x.dtype
    else:  # one rounding of a float32 sum
        assert torch.equal(total, (x.float() + residual.float()).to(x.dtype))


def check_silu(run, x, up=None):
    gate, other = x.double().chunk(2, -1) if up is None else (x.double(), up.double())
    codes, scales = run(x, up)
    check_codes(codes, scales, gate * torch.sigmoid(gate) * other)


RUNS = {"host": host, "meaning": eager}


@pytest.mark.parametrize("name", RUNS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 2, 5, 33]),
    st.sampled_from(SIZES),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.sampled_from(FLOATS),
    st.integers(0, 999),
)
def test_norm_on_odd_shapes(name, rows, size, dtype, residual, weight_dtype, seed):
    check_norm(RUNS[name].rms_norm_quant, norm_arguments(rows, size, dtype, residual, weight_dtype, seed))


@pytest.mark.parametrize("name", RUNS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 5]), st.sampled_from(SIZES), st.sampled_from(FLOATS), st.booleans(), st.integers(0, 9))
def test_silu_on_odd_shapes(name, rows, size, dtype, apart, seed):
    x = randn(rows, 2 * size, seed=seed, dtype=dtype) * 4
    check_silu(RUNS[name].silu_mul_quant, *([half.clone() for half in x.chunk(2, -1)] if apart else [x]))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    check_norm(host.rms_norm_quant, norm_arguments(7, 133, dtype, True, BF16))
    check_silu(host.silu_mul_quant, randn(7, 266, dtype=dtype))


@contextmanager
def guarded(monkeypatch):
    """Results of the kernel have numbers behind them, which it must leave alone."""
    behind = []

    def empty(shape, dtype):
        count = math.prod(shape)
        memory = torch.full((count + 64,), 77, dtype=dtype)
        behind.append(memory[count:])
        return memory[:count].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(host.torch, "empty", empty)
        yield
    assert behind and all((numbers == 77).all() for numbers in behind)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", FLOATS)
# Rows of both codes and sums are whole lines, of sums alone, the same but not twice a vector of float32, of neither.
@pytest.mark.parametrize("size", [2048, 2080, 2064, 2051])
def test_results_that_are_written_past_the_caches(isa, dtype, size, monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    gates = randn(600, 2 * size, dtype=dtype) * 4
    gates[7], gates[8, :9] = 0, torch.inf  # whose codes are all 0
    with guarded(monkeypatch):
        norms = host.rms_norm_quant(*norm_arguments(600, size, dtype, True))
        codes, scales = host.silu_mul_quant(gates)
    check_norm(lambda *_: norms, norm_arguments(600, size, dtype, True))
    assert not codes[7:9].any() and scales[7] == 0 and not scales[8].isfinite()
    kept = [row for row in range(600) if row not in (7, 8)]
    check_silu(lambda *_: (codes[kept], scales[kept]), gates[kept])


@pytest.mark.parametrize("isa", HERE)
def test_a_gate_is_the_first_call_of_a_thread(isa, monkeypatch):
    """Each thread has memory of its own for the rows that it keeps, and a gate has no weight that wants some."""
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(check_silu, host.silu_mul_quant, randn(7, 266)).result()


def test_extreme_gates_and_rows_of_zeros():
    x = torch.zeros(4, 40)
    x[0, :20] = torch.linspace(-200, 200, 20)
    x[0, 20:] = 1
    x[1] = 1e18
    x[2] = 1e-18
    x[3, :20], x[3, 20:] = torch.linspace(-1e30, 1, 20), 1e18
    check_silu(host.silu_mul_quant, x)
    codes, scales, _ = host.rms_norm_quant(torch.zeros(2, 5), None, torch.ones(5), 1e-6)
    assert not codes.any() and not scales.any()


@pytest.mark.parametrize("isa", HERE)
def test_each_gate_by_itself(isa, monkeypatch):
    """A row of one value: its scale says how exact the sigmoid is, for every magnitude."""
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    gates = torch.cat([torch.linspace(-86.9, 100, 4001), torch.logspace(-30, 2, 400), -torch.logspace(-30, 1.9, 400)])
    for up in (2.0, -3.0, 1e4):  # scales that are normal numbers
        check_silu(host.silu_mul_quant, torch.stack([gates, torch.full_like(gates, up)], 1))
    x = torch.tensor([[-300.0, 1.0, 1.0, 1.0], [-torch.inf, 1.0, 1.0, 1.0], [-3e38, 1.0, 3e38, 1.0]])
    codes, scales = host.silu_mul_quant(x)
    assert codes[0].tolist() == [0, 127] and not scales[1].isfinite() and codes[2].tolist() == [0, 127]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_norm_of_sizes_at_the_ends_of_float32(dtype, weight_dtype):
    """Where float64 would not overflow, float32's meaning says what comes out."""
    top = 6e4 if F16 in (dtype, weight_dtype) else 1e38
    sizes = ((1e-30, 1.0), (1e18, top), (1e18, 1e-30), (1e25, 1e-3), (1e25, top), (1.0, 1e-30), (3e38, 2.0))
    for of_x, of_weight in (*sizes, (1.0, 1e-39)):
        x, weight = (randn(3, 70, seed=seed).clamp(-1, 1) for seed in (1, 2))
        x, weight = (x * of_x).to(dtype), (weight[0] * of_weight).to(weight_dtype)
        for residual in (None, x.flip(0) / 2):
            arguments = (x, residual, weight, 1e-6)
            codes, scales, total = host.rms_norm_quant(*arguments)
            meant = eager.rms_norm_quant(*arguments)
            torch.testing.assert_close(scales, meant[1], **tolerance(F32, 70, 1e-36), equal_nan=True)
            assert torch.equal(total, meant[2]) or not meant[2].isfinite().all()
            visible = scales.squeeze(-1) > 1e-36
            assert ((codes.int() - meant[0].int())[visible].abs() <= 1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_the_scale_of_its_row_alone(value):
    x = randn(3, 64)
    x[1, 5] = value
    for module in RUNS.values():
        _, scales, _ = module.rms_norm_quant(x, None, torch.ones(64), 1e-6)
        assert scales[[0, 2]].isfinite().all() and not scales[1].isfinite().any()
        _, scales = module.silu_mul_quant(x)
        assert scales[[0, 2]].isfinite().all() and not scales[1].isfinite().any()


def test_strided_rows_leading_dimensions_and_no_rows():
    wide = randn(2, 6, 200, dtype=BF16)
    x, residual = wide[..., 10:74], wide[..., 100:164]
    strided = torch.ops.gcu.rms_norm_quant(x, residual, torch.ones(64), 1e-5)
    packed = torch.ops.gcu.rms_norm_quant(x.contiguous(), residual.contiguous(), torch.ones(64), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True)) and strided[0].shape == (2, 6, 64)
    codes, scales = torch.ops.gcu.silu_mul_quant(wide[..., 4:])
    assert codes.shape == (2, 6, 98) and scales.shape == (2, 6, 1)
    assert torch.ops.gcu.silu_mul_quant(wide[:0])[0].shape == (0, 6, 100)


def test_matrices_go_the_short_way_and_all_else_the_long_one(monkeypatch):
    long = []

    def dispatch(op, *args, **kwargs):
        long.append(op.name)
        return original(op, *args, **kwargs)

    original = registry.dispatch
    monkeypatch.setattr(registry, "dispatch", dispatch)
    wide, weight = randn(6, 200), randn(64)
    for dtype in FLOATS:
        x = wide.to(dtype)
        for rows in (0, 1, 6):
            for of_weight in FLOATS:
                for residual in (None, x[:rows, 70:134], randn(rows, 64, dtype=dtype)):
                    check_norm(torch.ops.gcu.rms_norm_quant, (x[:rows, 3:67], residual, weight.to(of_weight), 1e-6))
            check_silu(torch.ops.gcu.silu_mul_quant, x[:rows, 3:103])
            check_silu(torch.ops.gcu.silu_mul_quant, x[:rows, 3:67], x[:rows, 70:134])
    assert not long
    turned, apart = randn(64, 3).T, wide[:, ::2]
    check_norm(torch.ops.gcu.rms_norm_quant, (turned, None, weight, 1e-6))
    check_norm(torch.ops.gcu.rms_norm_quant, (randn(3, 64), turned, weight, 1e-6))
    check_norm(torch.ops.gcu.rms_norm_quant, (randn(3, 64), None, wide[0, :128:2], 1e-6))
    check_norm(torch.ops.gcu.rms_norm_quant, (randn(2, 3, 64), None, weight, 1e-6))
    check_silu(torch.ops.gcu.silu_mul_quant, apart)
    check_silu(torch.ops.gcu.silu_mul_quant, apart, wide[:, 100:])
    check_silu(torch.ops.gcu.silu_mul_quant, randn(10))
    assert len(long) == 7


def test_a_view_that_negates_is_negated_on_the_short_way():
    x, other = (torch._neg_view(randn(5, 64, seed=seed)) for seed in (0, 1))
    for one, two in ((x, other), (x.resolve_neg(), other), (x, other.resolve_neg())):
        check_norm(direct.rms_norm_quant, (one, two, torch.ones(64), 1e-6))
        check_silu(direct.silu_mul_quant, one, two)


def test_under_a_mode_or_a_transform_it_is_the_operation():
    """The first would make results of the kernel elsewhere, without memory; those of the others have no memory."""
    x, weight = randn(2, 64), torch.ones(64)
    calls = {"silu": (direct.silu_mul_quant, x), "norm": (direct.rms_norm_quant, x, None, weight, 1e-6)}
    for call, *arguments in calls.values():
        expected = call(*arguments)
        with torch.device("meta"):
            assert all(torch.equal(a, b) for a, b in zip(call(*arguments), expected, strict=True))
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in arguments]
            found = call(*fakes)
        for one in (found, call(*fakes)):
            assert all(isinstance(a, FakeTensor) and a.shape == b.shape for a, b in zip(one, expected, strict=True))
    compiled = torch.compile(lambda x: torch.ops.gcu.silu_mul_quant(x * 2), backend="gcu", options={"cache": False})
    expected = compiled(x)
    with torch.device("meta"):
        assert all(torch.equal(a, b) for a, b in zip(compiled(x), expected, strict=True))
    batched = torch.vmap(lambda x: direct.silu_mul_quant(x)[0])(x.view(2, 1, 64))
    assert torch.equal(batched, direct.silu_mul_quant(x)[0].view(2, 1, 32))


def test_generated_code_goes_the_short_way():
    weight = randn(64)

    def fn(x, residual):
        codes, scales, total = torch.ops.gcu.rms_norm_quant(x, residual, weight, 1e-6)
        gated, steps = torch.ops.gcu.silu_mul_quant(total * 2)
        return codes.int() + 1, scales * 2, total, gated.int(), steps

    x, residual = randn(5, 64, dtype=BF16), randn(5, 64, seed=1, dtype=BF16)
    found, (code,) = run_and_get_code(torch.compile(fn, backend="gcu", fullgraph=True), x, residual)
    assert all(torch.equal(a, b) for a, b in zip(found, fn(x, residual), strict=True))
    assert "gcu_direct.rms_norm_quant(" in code and "gcu_direct.silu_mul_quant(" in code


def test_codes_go_to_the_product_as_they_are():
    x, weight = randn(5, 64, dtype=BF16), torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    codes, scales, _ = torch.ops.gcu.rms_norm_quant(x, None, torch.ones(64), 1e-6)
    y = torch.ops.gcu.int8_gemm(codes, weight, torch.ones(1, 16), scales, layout="int8_rows", out_dtype=BF16)
    exact = (codes.double() * scales.double()) @ weight.double().T
    torch.testing.assert_close(y.double(), exact, **tolerance(BF16, 1, exact.abs().max().item()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 70, 9000])
def test_triton_kernels_in_the_interpreter(dtype, size):
    pytest.importorskip("triton")
    for residual in (False, True):
        arguments = norm_arguments(3, size, dtype, residual, BF16)
        assert triton.refuses(*arguments) is None
        check_norm(triton.rms_norm_quant, arguments)
    check_silu(triton.silu_mul_quant, randn(3, 2 * size, dtype=dtype))
    check_silu(triton.silu_mul_quant, randn(3, size, dtype=dtype), randn(3, 2 * size, seed=1, dtype=dtype)[:, :size])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.rms_norm_quant(torch.ones(2, 4), torch.ones(2, 5), torch.ones(4), 0.0), r"residual is \[2, 5\]"),
        (lambda op: op.rms_norm_quant(torch.ones(2, 4), None, torch.ones(5), 0.0), r"weight is \[5\].*expected.*\[4\]"),
        (lambda op: op.rms_norm_quant(torch.ones(2, 4).int(), None, torch.ones(4), 0.0), "x is torch.int32"),
        (lambda op: op.silu_mul_quant(torch.ones(2, 5)), "5 values are not a gate and an up"),
        (lambda op: op.silu_mul_quant(torch.ones(2, 4), torch.ones(2, 4).half()), "up is .* torch.float16"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call(torch.ops.gcu)


def test_refusals_name_the_dtype_and_the_meaning_runs():
    registry.fallbacks.clear()
    x = randn(2, 8).double()
    check_norm(torch.ops.gcu.rms_norm_quant, (x, x, torch.ones(8), 1e-6))
    ((name, reason),) = registry.fallbacks
    assert name == "rms_norm_quant" and "x is torch.float64" in reason


def test_traced_with_symbolic_rows():
    weight = torch.ones(64)

    def fn(x, residual):
        codes, scales, total = torch.ops.gcu.rms_norm_quant(x, residual, weight, 1e-6)
        alone = torch.ops.gcu.rms_norm_quant(x, None, weight, 1e-6)
        return codes, scales, total, *alone, *torch.ops.gcu.silu_mul_quant(x)

    compiled = torch.compile(fn, backend="gcu", dynamic=True, fullgraph=True, options={"inductor": False})
    for rows in (2, 5):
        x, residual = randn(rows, 64, dtype=BF16), randn(rows, 64, seed=1, dtype=BF16)
        assert all(torch.equal(a, b) for a, b in zip(compiled(x, residual), fn(x, residual), strict=True))
