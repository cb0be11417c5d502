"""A mixture's quantised experts in one go, without the cost of a dozen small operations between the products.

What it means is what `dequant_gemm/experts.py` says in operations: sort the rows by expert, multiply with gate and up,
activate, multiply with down, and sum each token's rows by its weights. The kernels are the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch

from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels import registry
from gcu_compile.kernels.host import build, dequant_gemm, int8_gemm, prologues, weighted_sum
from gcu_compile.kernels.host.dtypes import FLOATS
from gcu_compile.kernels.host.known import Known
from gcu_compile.kernels.modes_private import watched

FIELDS = struct.Struct("7P5q2i")  # `struct Arguments` of route.cpp, field by field


def _known(part: Any, known: Known) -> Any:
    """What a grouped product has found of the weights before, or None."""
    found = known.find(part.weight, part.scales, part.zeros, part.bias)
    return found if found is not None and found.layout == part.layout else None


def run(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, gate_up: Any, down: Any, *, int8: bool,
    activate: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor | None:  # fmt: skip
    """What the experts make of `x`.

    Args:
        x: [tokens, hidden]; floating point.
        topk_weights, topk_ids: [tokens, top_k]; float32, and int32 or int64.
        gate_up, down: `Weights` of `dequant_gemm/experts.py`, without g_idx.
        int8: whether activations are quantised per token (`gcu::int8_gemm_grouped`).
        activate: [rows, 2 * inner] -> [rows, inner]. None: SwiGLU and its quantisation (with `int8` alone).

    Returns:
        [tokens, hidden] in the dtype of `x`; None: there is more to look at than is looked at here.
    """
    known = (int8_gemm if int8 else dequant_gemm).experts
    first, second = _known(gate_up, known), _known(down, known)
    if (
        first is None
        or second is None
        or first.n != 2 * second.k
        or gate_up.scales.shape[0] != down.scales.shape[0]  # each was checked alone, with other rows
        or x.dtype not in FLOATS
        or x.dim() != 2
        or x.shape[1] != first.k
        or not x.shape[0]
        or not (x.is_cpu and x.is_contiguous())
        or x.is_neg()
        or topk_ids.dtype not in (torch.int32, torch.int64)
        or topk_ids.dim() != 2
        or topk_ids.shape != topk_weights.shape
        or topk_ids.shape[0] != x.shape[0]
        or topk_weights.dtype is not torch.float32
        or not (topk_ids.is_contiguous() and topk_weights.is_contiguous())
        or registry.watcher is not None
        or watched()
    ):
        return None
    try:
        return _run(x, topk_weights, topk_ids, first, second, gate_up.scales.shape[0], int8, activate)
    except KernelBuildError:  # the operations say so
        return None


def _run(x, topk_weights, topk_ids, first, second, experts, int8, activate) -> torch.Tensor | None:
    (tokens, top_k), dtype = topk_ids.shape, x.dtype
    count, scales, row_scales = tokens * top_k, None, None
    if int8:  # a token once, not for each of its experts
        x, scales, _ = int8_gemm.run_quantize(x)
        row_scales = torch.empty((count, 1), dtype=torch.float32)
    place, offsets = torch.empty(count, dtype=torch.int64), torch.empty(experts + 1, dtype=torch.int64)
    rows = torch.empty((count, x.shape[1]), dtype=x.dtype)
    row_bytes = x.shape[1] * x.itemsize
    fields = FIELDS.pack(
        topk_ids.data_ptr(), x.data_ptr(), 0 if scales is None else scales.data_ptr(), place.data_ptr(),
        offsets.data_ptr(), rows.data_ptr(), 0 if row_scales is None else row_scales.data_ptr(), tokens, top_k, experts,
        row_bytes, row_bytes, topk_ids.dtype is torch.int64, torch.get_num_threads(),
    )  # fmt: skip
    if build.load("route").gcu_route(fields):  # an expert that is not here
        return None
    y = first.multiply_grouped(rows, offsets, experts, row_scales, dtype)
    if activate is None:
        y, row_scales = prologues.silu_mul_quant(y)
    else:
        y, row_scales = activate(y), None
    y = second.multiply_grouped(y, offsets, experts, row_scales, dtype)
    name = "int8_gemm_grouped" if int8 else "dequant_gemm_grouped"
    registry.calls[name, "host_cpp"] += 2
    if int8:
        registry.calls["quantize_per_token", "host_cpp"] += 1
        registry.calls["silu_mul_quant", "host_cpp"] += activate is None
    return weighted_sum.run(y, place, topk_weights)
