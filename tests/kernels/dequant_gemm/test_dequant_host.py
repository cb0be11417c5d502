"""The C++ kernels against float64, on every instruction set, at the tolerance of the table."""

import pytest
import torch
from amx_emulation import BEST, EMULATED, ISAS
from dequant_cases import FLOATS, assert_close, dequant_arguments, dequant_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.kernels.host import dequant_gemm as host
from gcu_compile.kernels.host import prepack

NATIVE = ("host_int4", "host_int8")
TENSORS = ("weight", "scales", "zeros", "g_idx", "bias")
# (inputs, groups): whole words, parts of words, odd, one group of everything, more than one block of the kernel.
SIZES = [(64, 1), (64, 2), (128, 4), (96, 3), (30, 5), (17, 1), (7, 7), (576, 9), (1, 1), (1200, 1), (2048, 16)]
DTYPES = st.sampled_from(FLOATS)
SHARED = [HealthCheck.function_scoped_fixture]  # all examples of a test are for one `use_isa`


def check(arguments):
    assert host.refuses(**arguments) is None
    y = host.run(**arguments)
    assert y.dtype == arguments["x"].dtype
    assert_close(y, dequant_reference(**arguments), arguments["x"].shape[-1])
    return y


@st.composite
def products(draw, sizes=SIZES, rows=(1, 2, 3, 4, 5, 6, 7, 8, 9, 13)):
    k, groups = draw(st.sampled_from(sizes))
    return dequant_arguments(
        draw(st.sampled_from(NATIVE)),
        draw(st.sampled_from(rows)),
        draw(st.sampled_from([1, 3, 16, 40, 64, 65, 130])),
        k,
        groups,
        draw(DTYPES),
        draw(DTYPES),
        zeros=draw(st.booleans()),
        g_idx=draw(st.sampled_from([False, False, True])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@pytest.mark.parametrize("isa", BEST)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=SHARED)
@given(products())
def test_products_on_odd_shapes(isa, use_isa, arguments):
    use_isa(isa)
    check(arguments)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None)
@given(products(rows=(1, 2, 3, 4, 5, 6, 7, 12, 191, 192, 193, 400)))
def test_long_sweep(arguments):
    check(arguments)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", NATIVE)
def test_every_instruction_set(isa, dtype, layout, use_isa):
    use_isa(isa)
    for m, zeros, g_idx in ((1, False, False), (3, True, False), (4, False, True), (200, True, False)):
        check(dequant_arguments(layout, m, 70, 64, 2, dtype, torch.float16, zeros, g_idx, bias=True))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("avx512", "amx", EMULATED)])
@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("zeros", [False, True])
def test_many_rows_of_bfloat16(isa, layout, zeros, use_isa):
    """Tiles of rows that are whole and not, alone and in pairs; groups of a step, of parts of a block, and cut ones."""
    use_isa(isa)
    for k, groups in ((96, 3), (640, 5), (576, 1), (1200, 1), (17, 1), (80, 5)):
        for m in (3, 16, 17, 40, 75, 530):
            check(dequant_arguments(layout, m, 70, k, groups, torch.bfloat16, torch.bfloat16, zeros, seed=m))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zeros", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_zeros_of_every_dtype_and_a_scale_for_the_tensor(dtype, zeros):
    a = dequant_arguments("host_int4", 2, 40, 64, 1, dtype, zeros=True)
    a["zeros"] = a["zeros"].to(zeros)
    a["scales"] = a["scales"][:, :1].expand(1, 40)
    check(a)


def test_strided_rows_and_leading_dimensions():
    a = dequant_arguments("host_int4", 12, 40, 64, 2)
    wide = torch.randn(2, 6, 100)
    a["x"] = wide[..., 10:74]
    y = host.run(**a)
    assert y.shape == (2, 6, 40)
    assert torch.equal(y, host.run(**{**a, "x": a["x"].contiguous()}))
    a["x"] = wide.transpose(0, 1)[..., ::1][..., :64]
    assert torch.equal(host.run(**a), host.run(**{**a, "x": a["x"].contiguous()}))


def test_no_rows():
    a = dequant_arguments("host_int4", 0, 40, 64, 2, torch.bfloat16)
    assert host.run(**a).shape == (0, 40)


@pytest.mark.parametrize("isa", BEST)
def test_rows_do_not_depend_on_each_other(isa, use_isa):
    use_isa(isa)
    a = dequant_arguments("host_int4", 9, 70, 128, 4, torch.bfloat16, zeros=True)
    whole = host.run(**a).float()
    for row in range(9):
        alone = host.run(**{**a, "x": a["x"][row : row + 1]})
        assert_close(alone, whole[row : row + 1].double(), 128)


def test_large_activations_and_infinities():
    a = dequant_arguments("host_int8", 2, 64, 64, 1, torch.float32)
    a["x"][0, 0] = 1e30
    a["x"][1, 0] = torch.inf
    y = host.run(**a)
    assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("layout", NATIVE)
def test_grouped(isa, layout, use_isa):
    use_isa(isa)
    experts = [dequant_arguments(layout, 7, 70, 64, 2, torch.bfloat16, zeros=True, bias=True, seed=i) for i in range(4)]
    stacked = {n: torch.stack([one[n] for one in experts]) for n in ("weight", "scales", "zeros", "bias")}
    offsets = torch.tensor([0, 2, 2, 6, 7])
    before = registry.calls["dequant_gemm_grouped", "host_cpp"]
    y = torch.ops.gcu.dequant_gemm_grouped(experts[0]["x"], offsets, **stacked, layout=layout)
    assert registry.calls["dequant_gemm_grouped", "host_cpp"] == before + 1
    for e, one in enumerate(experts):
        rows = slice(offsets[e], offsets[e + 1])
        assert_close(y[rows], dequant_reference(**{**one, "x": experts[0]["x"][rows]}), 64)


@pytest.mark.parametrize("isa", BEST)
@pytest.mark.parametrize("layout", NATIVE)
@pytest.mark.parametrize("more", [{}, {"zeros": True, "bias": True}, {"g_idx": True}])
def test_experts_are_products_of_their_own(isa, layout, more, use_isa):
    """Of few and many rows, some without, and rows that belong to none; the very numbers of one product each."""
    use_isa(isa)
    cuts = (3, 4, 4, 13, 230, 233, 241)
    experts = [dequant_arguments(layout, 1, 70, 96, 3, torch.bfloat16, **more, seed=i) for i in range(len(cuts) - 1)]
    names = ("weight", "scales", *more)
    x = torch.randn(250, 200, generator=torch.Generator().manual_seed(0)).bfloat16()[:, 17:113]
    stacked = {name: torch.stack([one[name] for one in experts]) for name in names}
    y = host.run_grouped(x, torch.tensor(cuts), **stacked, layout=layout)
    for first, last, one in zip(cuts, cuts[1:], experts, strict=False):
        if first < last:
            assert torch.equal(y[first:last], host.run(x[first:last], *(one.get(n) for n in TENSORS), layout=layout))
    assert not y[: cuts[0]].any() and not y[cuts[-1] :].any()
    assert not host.run_grouped(x, torch.zeros(len(cuts), dtype=torch.int32), **stacked, layout=layout).any()


def test_wrong_group_index_is_named():
    a = dequant_arguments("host_int4", g_idx=True)
    a["g_idx"][5] = 2
    with pytest.raises(InvalidInputError, match="g_idx leaves the 2 groups"):
        torch.ops.gcu.dequant_gemm(**a)


@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
@pytest.mark.parametrize("zeros", [False, True])
def test_other_layouts_are_repacked_once(layout, zeros, monkeypatch):
    a = dequant_arguments(layout, 3, 70, 64, 2, torch.bfloat16, zeros=zeros)
    check(a)
    monkeypatch.setattr(layouts, "repack", lambda *args: pytest.fail("repacked again"))
    check(a)


def test_a_weight_that_was_written_is_repacked():
    a = dequant_arguments("gptq_int4")
    check(a)
    a["weight"].copy_(dequant_arguments("gptq_int4", seed=1)["weight"])
    check(a)


def test_a_copy_goes_with_its_weight():
    a = dequant_arguments("gptq_int4")
    host.run(**a)
    before = len(prepack._kept)
    del a["weight"]
    assert len(prepack._kept) == before - 1


def test_a_weight_that_cannot_be_followed_runs_as_plain_torch_and_says_so():
    registry.fallbacks.clear()
    a = dequant_arguments("awq_int4")
    torch.ops.gcu.dequant_gemm(**{**a, "weight": a["weight"][:]})
    ((name, reason),) = registry.fallbacks
    assert name == "dequant_gemm" and "layout awq_int4 is a view" in reason
