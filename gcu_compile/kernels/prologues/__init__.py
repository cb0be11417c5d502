"""What runs before an int8 product, with its quantisation: `gcu::rms_norm_quant`, `gcu::silu_mul_quant`.

Their codes and scales go to `gcu::int8_gemm` as they are. Meanings: `eager.py`.
"""

from __future__ import annotations

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.host import prologues as host
from gcu_compile.kernels.prologues import check, eager
from gcu_compile.kernels.triton import prologues as triton


def _checked(check_arguments, run):
    def call(*args, **kwargs):
        check_arguments(*args, **kwargs)
        return run(*args, **kwargs)

    return call


def _codes_fake(x: torch.Tensor, size) -> tuple[torch.Tensor, torch.Tensor]:
    leading = x.shape[:-1]
    return x.new_empty((*leading, size), dtype=torch.int8), x.new_empty((*leading, 1), dtype=torch.float32)


def _norm_fake(x, residual, weight, eps):
    return *_codes_fake(x, x.shape[-1]), x.new_empty(0 if residual is None else x.shape)


def _silu_fake(x, up=None):
    return _codes_fake(x, x.shape[-1] // 2 if up is None else x.shape[-1])


def _implementations(check_arguments, name: str) -> tuple[registry.Implementation, ...]:
    runs = {module: _checked(check_arguments, getattr(module, name)) for module in (host, triton)}
    return (
        registry.Implementation("host_cpp", ("cpu",), runs[host], host.refuses, getattr(host, f"direct_{name}")),
        registry.Implementation("triton", ("cuda", "gcu"), runs[triton], triton.refuses),
    )


RMS_NORM_QUANT = registry.register(
    registry.FusedOp(
        "rms_norm_quant",
        "(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
        eager=_checked(check.rms_norm_quant, eager.rms_norm_quant),
        fake=_norm_fake,
        accumulation=lambda x, *args, **kwargs: x.shape[-1],
        code_steps=1,
        implementations=_implementations(check.rms_norm_quant, "rms_norm_quant"),
    )
)
SILU_MUL_QUANT = registry.register(
    registry.FusedOp(
        "silu_mul_quant",
        "(Tensor x, Tensor? up=None) -> (Tensor, Tensor)",
        eager=_checked(check.silu_mul_quant, eager.silu_mul_quant),
        fake=_silu_fake,
        accumulation=lambda *args, **kwargs: 1,
        code_steps=1,
        implementations=_implementations(check.silu_mul_quant, "silu_mul_quant"),
    )
)
