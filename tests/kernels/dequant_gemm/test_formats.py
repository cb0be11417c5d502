"""Layers of checkpoints as arguments of the kernels: act-order undone, scales not rounded, errors by layer."""

import pytest
import torch
from dequant_cases import assert_close, dequant_arguments, dequant_reference

from gcu_compile.errors import CheckpointError
from gcu_compile.kernels.dequant_gemm import eager, formats, layouts

NAME, KIND = "model.layers.3.mlp.down_proj", "GPTQ int4"


def prepared(a, **changes):
    given = {name: a[name] for name in ("layout", "weight", "scales", "zeros", "g_idx")}
    return formats.prepare(NAME, KIND, **{**given, **changes})


def product(a, linear):
    x = a["x"] if linear.order is None else a["x"][:, linear.order]
    return eager.dequant_gemm(x, linear.weight, linear.scales, linear.zeros, linear.g_idx, layout=linear.layout)


@pytest.mark.parametrize(("layout", "target"), [("gptq_int4", "host_int4"), ("gptq_int8", "host_int8")])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("order", ["neighbours", "equal groups", "unequal groups"])
def test_prepared_layer_is_the_layer(layout, target, zeros, order):
    a = dequant_arguments(layout, zeros=zeros, k=64, groups=4)
    if order != "neighbours":
        a["g_idx"] = (torch.arange(64) % 4).to(torch.int32)
    if order == "unequal groups":
        a["g_idx"][0] = 1
    linear = prepared(a, target=target)
    assert linear.layout == target
    assert (linear.order is not None) == (order == "equal groups")
    assert (linear.g_idx is not None) == (order == "unequal groups")
    assert_close(product(a, linear), dequant_reference(**a), 64)


def test_scales_become_smaller_only_where_nothing_is_lost():
    a = dequant_arguments()
    assert prepared(a).scales.dtype == torch.float32
    assert prepared(a, scales=a["scales"].half().float()).scales.dtype == torch.float16
    assert prepared(a, scales=a["scales"].bfloat16().float()).scales.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("plus_one", [False, True])
def test_packed_zeros(bits, plus_one):
    zeros = torch.randint(1, 1 << bits, (3, 16))
    zeros[0, :3] = 0  # stored as the highest code in GPTQ's first form
    stored = layouts.pack((zeros - int(plus_one)) % (1 << bits), layouts.get(f"int{bits}_rows_i32"))
    assert torch.equal(formats.packed_zeros(stored, bits, 3, 16, plus_one).long(), zeros)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(8, 39, dtype=torch.int32)}, r"weight is \[8, 39\].*truncated"),
        ({"scales": torch.full((2, 40), torch.nan)}, "80 scales are NaN or infinite"),
        ({"scales": torch.ones(3, 40)}, "3 groups do not divide 64 inputs"),
        ({"zeros": torch.zeros(1, 40)}, r"zeros are \[1, 40\], scales \[2, 40\]"),
        ({"g_idx": torch.full((64,), 2)}, r"g_idx must be \[64\] with groups 0 .. 1"),
        ({"g_idx": torch.zeros(63)}, r"g_idx must be \[64\]"),
    ],
)
def test_errors_name_layer_and_format(changes, message):
    with pytest.raises(CheckpointError, match=rf"^{NAME} \(GPTQ int4\): .*{message}"):
        prepared(dequant_arguments(), **changes)
