"""Unquantised layers of bfloat16 on the host: their weights are packed once, and `gcu::linear` multiplies with them."""

from __future__ import annotations

import functools

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from gcu_compile.kernels import direct
from gcu_compile.kernels.host import pages
from gcu_compile.kernels.host.build import load_ahead
from gcu_compile.kernels.linear import is_fastest, pack
from gcu_compile.options import resolve
from vllm_integration import vllm_private

LEAST_OUTPUTS = 64  # fewer are a router's or the like: most of a strip would be nothing


def install() -> None:
    """Let option `linear` decide who multiplies, in layers that are loaded from now on."""
    said = resolve().linear
    if said == "gcu" or (said == "auto" and is_fastest()):
        load_ahead("linear")
        vllm_private.replace_linear(prepare)


def prepare(layer: torch.nn.Module, remove_weight: bool) -> bool:
    """Give `layer` its product, `layer.cpu_linear(x, weight, bias)`; false: it is none of ours.

    Args:
        remove_weight: nothing but the product reads `layer.weight`, which then becomes the packed one.
    """
    weight = layer.weight
    if weight.is_meta or weight.dim() != 2 or weight.dtype != torch.bfloat16 or len(weight) < LEAST_OUTPUTS:
        return False
    if remove_weight:
        layer.weight = Parameter(placed(weight), requires_grad=False)
        layer.cpu_linear = functools.partial(multiply, len(weight))
    elif isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
        # Most are looked up in, and never multiplied with: packed when they are.
        packed = functools.cache(lambda: placed(layer.weight))
        layer.cpu_linear = lambda x, weight, bias: multiply(len(weight), x, packed(), bias)
    else:
        packed = placed(weight)
        layer.cpu_linear = lambda x, weight, bias: multiply(len(weight), x, packed, bias)
    return True


def placed(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [N, K], packed, where it is streamed from."""
    return pages.huge(pack(weight.data))


def multiply(n: int, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[..., n] of x [..., K]."""
    call = torch.ops.gcu.linear.default if torch.compiler.is_compiling() else direct.linear
    return call(x, packed, n, bias)
