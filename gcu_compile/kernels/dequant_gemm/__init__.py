"""Quantised matrix products as single operations: `gcu::dequant_gemm`, `gcu::int8_gemm`, their grouped forms for
mixtures of experts, and `gcu::quantize_per_token`. Meanings: `eager.py`; weight storage: `layouts.py`."""

from __future__ import annotations

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.dequant_gemm import check, eager
from gcu_compile.kernels.host import dequant_gemm as host
from gcu_compile.kernels.host import int8_gemm as host_int8
from gcu_compile.kernels.triton import dequant_gemm as triton
from gcu_compile.kernels.triton import int8_gemm as triton_int8


def _dequant_gemm(x, *args, **kwargs):
    check.dequant_gemm(x, *args, **kwargs)
    return eager.dequant_gemm(x, *args, **kwargs)


def _int8_gemm(x, *args, **kwargs):
    check.int8_gemm(x, *args, **kwargs)
    return eager.int8_gemm(x, *args, **kwargs)


def _dequant_gemm_grouped(x, offsets, *args, **kwargs):
    check.grouped(check.dequant_gemm, "dequant_gemm_grouped", x, offsets, *args, **kwargs)
    return eager.dequant_gemm_grouped(x, offsets, *args, **kwargs)


def _int8_gemm_grouped(x, *args, **kwargs):
    check.int8_grouped(x, *args, **kwargs)
    return eager.int8_gemm_grouped(x, *args, **kwargs)


def _quantize(x, group_size=0, symmetric=True):
    check.quantize(x, group_size)
    return eager.quantize(x, group_size, symmetric)


def _linear_fake(x, weight, scales, *args, layout, out_dtype=None, **kwargs):
    dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    return x.new_empty((*x.shape[:-1], scales.shape[-1]), dtype=dtype)


def _grouped_fake(x, offsets, *args, **kwargs):
    return _linear_fake(x, *args, **kwargs)


def _quantize_fake(x, group_size=0, symmetric=True):
    shape = (*x.shape[:-1], x.shape[-1] // group_size if group_size else 1)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int32),
    )


def _inputs(x, *args, **kwargs) -> int:
    return x.shape[-1]


def _on_card(check_arguments, run, refuses) -> registry.Implementation:
    """The Triton kernel, after the checks; those of values would wait for the device, and are left to the meaning."""

    def call(*args, **kwargs):
        check_arguments(*args, **kwargs)
        return run(*args, **kwargs)

    return registry.Implementation("triton", ("cuda", "gcu"), call, refuses)


def _experts(one, op):
    """The checks of a grouped form but for the values of its offsets."""

    def check_arguments(x, offsets, weight, scales, *args, **kwargs):
        one(x, weight, scales, *args, **kwargs, experts=tuple(scales.shape[:1]), op=op)

    return check_arguments


def _check_int8_experts(x, offsets, weight, scales, x_scales=None, bias=None, **kwargs):
    _experts(check.int8_gemm, "int8_gemm_grouped")(x, offsets, weight, scales, x_scales=x_scales, bias=bias, **kwargs)


DEQUANT_GEMM = registry.register(
    registry.FusedOp(
        "dequant_gemm",
        "(Tensor x, Tensor weight, Tensor scales, Tensor? zeros=None, Tensor? g_idx=None, Tensor? bias=None, *, "
        "str layout) -> Tensor",
        eager=_dequant_gemm,
        fake=_linear_fake,
        accumulation=_inputs,
        implementations=(
            registry.Implementation("host_cpp", ("cpu",), host.run, host.refuses, host.direct),
            _on_card(check.dequant_gemm, triton.run, triton.refuses),
        ),
    )
)
INT8_GEMM = registry.register(
    registry.FusedOp(
        "int8_gemm",
        "(Tensor x, Tensor weight, Tensor scales, Tensor? x_scales=None, Tensor? x_zeros=None, Tensor? zeros=None, "
        "Tensor? bias=None, *, str layout, ScalarType? out_dtype=None) -> Tensor",
        eager=_int8_gemm,
        fake=_linear_fake,
        accumulation=lambda *args, **kwargs: 1,  # the sum is exact in integers
        implementations=(
            registry.Implementation("host_cpp", ("cpu",), host_int8.run, host_int8.refuses, host_int8.direct),
            _on_card(check.int8_gemm, triton_int8.run, triton_int8.refuses),
        ),
    )
)
DEQUANT_GEMM_GROUPED = registry.register(
    registry.FusedOp(
        "dequant_gemm_grouped",
        "(Tensor x, Tensor offsets, Tensor weight, Tensor scales, Tensor? zeros=None, Tensor? g_idx=None, "
        "Tensor? bias=None, *, str layout) -> Tensor",
        eager=_dequant_gemm_grouped,
        fake=_grouped_fake,
        accumulation=_inputs,
        implementations=(
            registry.Implementation("host_cpp", ("cpu",), host.run_grouped, host.refuses_grouped),
            _on_card(_experts(check.dequant_gemm, "dequant_gemm_grouped"), triton.run_grouped, triton.refuses_grouped),
        ),
    )
)
INT8_GEMM_GROUPED = registry.register(
    registry.FusedOp(
        "int8_gemm_grouped",
        "(Tensor x, Tensor offsets, Tensor weight, Tensor scales, Tensor? x_scales=None, Tensor? bias=None, *, "
        "str layout, ScalarType? out_dtype=None, Tensor? x_zeros=None, Tensor? zeros=None) -> Tensor",
        eager=_int8_gemm_grouped,
        fake=_grouped_fake,
        accumulation=lambda *args, **kwargs: 1,
        implementations=(
            registry.Implementation("host_cpp", ("cpu",), host_int8.run_grouped, host_int8.refuses_grouped),
            _on_card(_check_int8_experts, triton_int8.run_grouped, triton_int8.refuses_grouped),
        ),
    )
)
QUANTIZE_PER_TOKEN = registry.register(
    registry.FusedOp(
        "quantize_per_token",
        "(Tensor x, int group_size=0, bool symmetric=True) -> (Tensor, Tensor, Tensor)",
        eager=_quantize,
        fake=_quantize_fake,
        implementations=(
            registry.Implementation("host_cpp", ("cpu",), host_int8.run_quantize, host_int8.refuses_quantize),
            _on_card(
                lambda x, group_size=0, symmetric=True: check.quantize(x, group_size),
                triton_int8.quantize,
                triton_int8.refuses_quantize,
            ),
        ),
    )
)
