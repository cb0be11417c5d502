"""`gcu_composite::fused_experts`: what the quantised experts of a mixture make of its tokens, after routing.

    rows sorted by expert -> gate and up, one grouped product -> activation -> down, one grouped product -> weighted sum

One operation, so that a compiler need not look into a step whose rows go where numbers say. It has no meaning of its
own: it is the operations that it calls, each with its meaning, its checks and its place in the shadow check. On the
host experts that were met before go in one piece, which gives the same bits (`kernels/host/experts.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import gcu_compile.kernels.prologues  # noqa: F401 - defines operations
from gcu_compile.errors import UnknownNameError
from gcu_compile.kernels import registry
from gcu_compile.kernels.host import experts as host
from gcu_compile.kernels.host import weighted_sum as host_sum

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}
TOKENS = 64  # whose rows are summed at once: in float32 those of 8 experts fill a few MB of cache, not memory
PART = "Tensor {0}, Tensor {0}_scales, Tensor? {0}_zeros, Tensor? {0}_g_idx, Tensor? {0}_bias"
SCHEMA = (
    f"fused_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, {PART.format('w13')}, {PART.format('w2')}, "
    "Tensor? expert_map=None, *, str w13_layout, str w2_layout, str activation, bool int8, "
    "bool weights_on_input=False, bool symmetric=True, Tensor? w13_x_scales=None, Tensor? w13_x_zeros=None, "
    "Tensor? w2_x_scales=None, Tensor? w2_x_zeros=None) -> Tensor"
)


@dataclass(frozen=True)
class Weights:
    """Those of one of the two products, of all experts: as for `gcu::dequant_gemm_grouped`.

    Of int8 activations, too: x_scales (and x_zeros) that are known, or, without them, whether what each token gets is
    `symmetric`.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    g_idx: torch.Tensor | None
    bias: torch.Tensor | None
    layout: str
    x_scales: torch.Tensor | None = None
    x_zeros: torch.Tensor | None = None
    symmetric: bool = True

    def multiply(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """[rows, K] sorted by expert -> [rows, N]."""
        rest = self.scales, self.zeros, self.g_idx, self.bias
        return torch.ops.gcu.dequant_gemm_grouped.default(x, offsets, self.weight, *rest, layout=self.layout)

    def codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x in int8, a scale (and zero) per token."""
        codes, scales, zeros = torch.ops.gcu.quantize_per_token.default(x, 0, self.symmetric)
        return codes, scales, None if self.symmetric else zeros

    def multiply_int8(self, x, offsets: torch.Tensor) -> torch.Tensor:
        """The same of activations that are quantised: by what is known, or per token."""
        if self.x_scales is None and not self.symmetric:
            return self.multiply_codes(*self.codes(x), offsets, x.dtype)
        return self.multiply_codes(x, self.x_scales, self.x_zeros, offsets, x.dtype)

    def multiply_codes(self, x, x_scales, x_zeros, offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The same of codes with their scales (and zeros)."""
        arguments = x, offsets, self.weight, self.scales, x_scales, self.bias
        more = {"layout": self.layout, "out_dtype": dtype, "x_zeros": x_zeros, "zeros": self.zeros}
        return torch.ops.gcu.int8_gemm_grouped.default(*arguments, **more)


def fused_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w13_zeros: torch.Tensor | None,
    w13_g_idx: torch.Tensor | None,
    w13_bias: torch.Tensor | None,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    w2_zeros: torch.Tensor | None,
    w2_g_idx: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None = None,
    *,
    w13_layout: str,
    w2_layout: str,
    activation: str,
    int8: bool,
    weights_on_input: bool = False,
    symmetric: bool = True,
    w13_x_scales: torch.Tensor | None = None,
    w13_x_zeros: torch.Tensor | None = None,
    w2_x_scales: torch.Tensor | None = None,
    w2_x_zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Args:
        x: [tokens, hidden]; floating point.
        topk_weights, topk_ids: [tokens, top_k]: each token's experts and what they weigh.
        w13, ...: gate and up, one above the other, of all experts: [E, 2 * inner, hidden] in `w13_layout`, with
            [E, groups, 2 * inner] scales and zeros, [E, hidden] g_idx, [E, 2 * inner] bias.
        w2, ...: down: [E, hidden, inner].
        expert_map: [all experts]: where each is among these; -1: on another rank.
        activation: one of `ACTIVATIONS`; gate times it, times up.
        int8: whether activations are quantised (`gcu::int8_gemm_grouped`).
        weights_on_input: a token is weighed before its experts, not their results.
        symmetric: activations that are quantised per token have no zeros.
        w13_x_scales, w13_x_zeros, w2_x_scales, w2_x_zeros: of activations whose scales are known: [E, 1, 1], an
            expert's own, or [1]. None: they are quantised per token.

    Returns:
        [tokens, hidden] in the dtype of `x`, summed in float32.

    Raises:
        UnknownNameError: another activation.
    """
    if activation not in ACTIVATIONS:
        raise UnknownNameError("activation", activation, ACTIVATIONS)
    of_x = (w13_x_scales, w13_x_zeros, symmetric), (w2_x_scales, w2_x_zeros, symmetric)
    first = Weights(w13, w13_scales, w13_zeros, w13_g_idx, w13_bias, w13_layout, *of_x[0])
    second = Weights(w2, w2_scales, w2_zeros, w2_g_idx, w2_bias, w2_layout, *of_x[1])
    swiglu = int8 and activation == "silu" and symmetric and w2_x_scales is None
    if expert_map is None and not weights_on_input and first.g_idx is None and second.g_idx is None:
        activate = None if swiglu else functools.partial(gated, activation)
        found = host.run(x, topk_weights, topk_ids, first, second, int8=int8, activate=activate)
        if found is not None:
            return found
    top_k = topk_ids.shape[1]
    ids = topk_ids.reshape(-1).long()
    if expert_map is not None:
        ids = expert_map.long()[ids]
    order = torch.argsort(ids, stable=True)
    offsets = torch.searchsorted(ids[order], torch.arange(w13_scales.shape[0] + 1, device=ids.device))
    weights, tokens = topk_weights.to(torch.float32), order // top_k
    if weights_on_input:
        rows = (x.index_select(0, tokens) * weights.reshape(-1, 1)[order]).to(x.dtype)
        gate_up = first.multiply_int8(rows, offsets) if int8 else first.multiply(rows, offsets)
        weights = torch.ones_like(weights)
    elif int8 and w13_x_scales is None:  # a token is quantised once, not by each of its experts
        rows = (None if part is None else part.index_select(0, tokens) for part in first.codes(x))
        gate_up = first.multiply_codes(*rows, offsets, x.dtype)
    else:
        rows = x.index_select(0, tokens)
        gate_up = first.multiply_int8(rows, offsets) if int8 else first.multiply(rows, offsets)
    if swiglu:  # the activation and its quantisation are one pass
        y = second.multiply_codes(*torch.ops.gcu.silu_mul_quant.default(gate_up), None, offsets, x.dtype)
    elif int8:
        y = second.multiply_int8(gated(activation, gate_up), offsets)
    else:
        y = second.multiply(gated(activation, gate_up), offsets)
    return weighted_sum(y, order, weights)


def gated(activation: str, gate_up: torch.Tensor) -> torch.Tensor:
    """[rows, inner] of gate and up, side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def weighted_sum(y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What each token gets of its experts, summed in float32.

    Args:
        y: [tokens * top_k, hidden]; row i belongs to place `order[i]` of `weights`, read row by row.
        weights: [tokens, top_k] float32.
    """
    tokens, top_k = weights.shape
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    if host_sum.refuses(y) is None:
        return host_sum.run(y, place, weights)
    found = y.new_empty(tokens, y.shape[1])
    for first in range(0, tokens, TOKENS):
        part = weights[first : first + TOKENS]
        rows = y.index_select(0, place[first * top_k : (first + TOKENS) * top_k]).to(torch.float32)
        found[first : first + TOKENS] = torch.bmm(part.unsqueeze(1), rows.view(*part.shape, -1)).squeeze(1)
    return found


registry.COMPOSITE.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
registry.COMPOSITE.impl("fused_experts", fused_experts, "CompositeExplicitAutograd")
torch.library.register_fake(
    "gcu_composite::fused_experts", lambda x, *args, **kwargs: x.new_empty(x.shape), lib=registry.COMPOSITE
)
