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

FIELDS = struct.Struct("9P5q2i")  # `struct Arguments` of route.cpp, field by field


def _known(part: Any, known: Known) -> Any:
    """What a grouped product has found of the weights before, or None."""
    found = known.find(part.weight, part.scales, part.zeros, part.bias)
    return found if found is not None and found.layout == part.layout else None


def _fits(part: Any, experts: int) -> bool:
    """Whether what is known of a part's activations lies as the kernel reads it."""
    return all(
        one is None or (one.dtype is dtype and one.shape == (experts, 1, 1) and one.is_cpu and one.is_contiguous())
        for one, dtype in ((part.x_scales, torch.float32), (part.x_zeros, torch.int32))
    )


def run(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, gate_up: Any, down: Any, *, int8: bool,
    activate: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor | None:  # fmt: skip
    """What the experts make of `x`.

    Args:
        x: [tokens, hidden]; floating point.
        topk_weights, topk_ids: [tokens, top_k]; float32, and int32 or int64.
        gate_up, down: `Weights` of `dequant_gemm/experts.py`, without g_idx.
        int8: whether activations are quantised (`gcu::int8_gemm_grouped`), as `gate_up` and `down` say.
        activate: [rows, 2 * inner] -> [rows, inner]. None: SwiGLU and its quantisation, per token and symmetric.

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
        or not (_fits(gate_up, gate_up.scales.shape[0]) and _fits(down, down.scales.shape[0]))
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
        return _run(x, topk_weights, topk_ids, first, second, gate_up, down, int8, activate)
    except KernelBuildError:  # the operations say so
        return None


def _run(x, topk_weights, topk_ids, first, second, gate_up, down, int8, activate) -> torch.Tensor | None:
    (tokens, top_k), dtype, experts = topk_ids.shape, x.dtype, gate_up.scales.shape[0]
    count, scales, zeros, quantised = tokens * top_k, None, None, 0
    row_scales = row_zeros = None
    if int8 and gate_up.x_scales is None:  # a token once, not for each of its experts
        x, scales, zeros = _quantise(x, gate_up.symmetric)
        quantised = 1
        row_scales = torch.empty((count, 1), dtype=torch.float32)
        row_zeros = None if zeros is None else torch.empty((count, 1), dtype=torch.int32)
    place, offsets = torch.empty(count, dtype=torch.int64), torch.empty(experts + 1, dtype=torch.int64)
    rows = torch.empty((count, x.shape[1]), dtype=x.dtype)
    row_bytes = x.shape[1] * x.itemsize
    fields = FIELDS.pack(
        topk_ids.data_ptr(), x.data_ptr(), *_pointers(scales, zeros), place.data_ptr(), offsets.data_ptr(),
        rows.data_ptr(), *_pointers(row_scales, row_zeros), tokens, top_k, experts, row_bytes, row_bytes,
        topk_ids.dtype is torch.int64, torch.get_num_threads(),
    )  # fmt: skip
    if build.load("route").gcu_route(fields):  # an expert that is not here
        return None
    if gate_up.x_scales is not None:
        row_scales, row_zeros = gate_up.x_scales, gate_up.x_zeros
    y = first.multiply_grouped(rows, offsets, experts, row_scales, dtype, row_zeros)
    row_scales, row_zeros = down.x_scales, down.x_zeros
    if activate is None:
        y, row_scales = prologues.silu_mul_quant(y)
    else:
        y = activate(y)
        if int8 and row_scales is None and not down.symmetric:
            y, row_scales, row_zeros = _quantise(y, False)
            quantised += 1
    y = second.multiply_grouped(y, offsets, experts, row_scales, dtype, row_zeros)
    name = "int8_gemm_grouped" if int8 else "dequant_gemm_grouped"
    registry.calls[name, "host_cpp"] += 2
    if int8:
        registry.calls["quantize_per_token", "host_cpp"] += quantised
        registry.calls["silu_mul_quant", "host_cpp"] += activate is None
    return weighted_sum.run(y, place, topk_weights)


def _quantise(x: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    codes, scales, zeros = int8_gemm.run_quantize(x, 0, symmetric)
    return codes, scales, None if symmetric else zeros


def _pointers(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
