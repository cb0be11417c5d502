"""Unquantised layers of bfloat16 on the host: their weights are packed once, and `gcu::linear` multiplies with them."""

from __future__ import annotations

import functools

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels import direct
from gcu_compile.kernels.host import build, pages
from gcu_compile.kernels.linear import is_fastest, pack
from gcu_compile.options import resolve
from vllm_integration import vllm_private
from vllm_integration.behaviours import log

LEAST_OUTPUTS = 64  # fewer are a router's or the like: most of a strip would be nothing


def install() -> None:
    """Let `prepare` see every layer that is loaded from now on."""
    if resolve().linear != "vllm":
        build.load_ahead("linear")  # while Python imports a model
    vllm_private.replace_linear(prepare)


def are_ours() -> bool:
    """Whether unquantised layers are ours, by option `linear` and what can be built here."""
    said = resolve().linear
    if said == "vllm":
        return False
    try:
        if said == "auto" and not is_fastest():
            return False
        build.load("linear")
    except KernelBuildError as error:
        _warn(f"Unquantised layers are vLLM's, though option linear is {said!r}: {error}")
        return False
    return True


_warn = functools.cache(log.warning)  # each once


def prepare(layer: torch.nn.Module, remove_weight: bool) -> bool:
    """Give `layer` its product, `layer.cpu_linear(x, weight, bias)`; false: it is none of ours.

    Args:
        remove_weight: nothing but the product reads `layer.weight`, which then becomes the packed one.
    """
    weight = layer.weight
    if not are_ours():
        return False
    if weight.is_meta or weight.dim() != 2 or weight.dtype != torch.bfloat16 or len(weight) < LEAST_OUTPUTS:
        return False
    if remove_weight:
        layer.weight = Parameter(placed(weight), requires_grad=False)
        layer.cpu_linear = functools.partial(multiply, len(weight))
    elif isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
        # Most are looked up in, and never multiplied with: packed when they are.
        packed = functools.cache(lambda: placed(layer.weight))

        def when_multiplied(x, weight, bias):
            if torch.compiler.is_compiling():  # a trace would pack it at each step
                return torch.nn.functional.linear(x, weight, bias)
            return multiply(len(weight), x, packed(), bias)

        layer.cpu_linear = when_multiplied
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
