"""What the quantised layers of all formats share: where prepared tensors go, and how they are applied."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

import gcu_compile.kernels.dequant_gemm  # noqa: F401  (defines the operations)
from gcu_compile.errors import CheckpointError, GcuCompileError
from gcu_compile.kernels.dequant_gemm import eager, formats
from gcu_compile.kernels.host.build import load_ahead
from vllm_integration.quantization import progress

ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
# Layouts that the kernels of a device read: C++ on the CPU, Triton elsewhere.
HOST, CARD = {4: "host_int4", 8: "host_int8"}, {4: "gptq_int4", 8: "int8_columns"}
BITS = {scalar_types.uint4: 4, scalar_types.uint4b8: 4, scalar_types.uint8: 8, scalar_types.uint8b128: 8}
TENSORS = ("weight", "scales", "zeros", "g_idx", "order")


def expect(*libraries: str) -> None:
    """One more layer was made; its weights will be prepared, and kernels of these `libraries` of the host run.

    Those are built while weights are read and Python traces, not when the first request waits.
    """
    progress.expect()
    if current_platform.device_type == "cpu":
        _build_ahead(libraries)


_build_ahead = functools.cache(lambda libraries: load_ahead(*libraries))


def target(weight: torch.Tensor, bits: int) -> str:
    """The layout that the kernels of the weight's device read."""
    return (HOST if weight.device.type == "cpu" else CARD)[bits]


def name_of(layer: torch.nn.Module) -> str:
    """For messages: where the layer stands in the model."""
    return getattr(layer, "prefix", "") or type(layer).__name__


def kind_of(layer: torch.nn.Module, default: str) -> str:
    """For messages: the layer's format, as far as its method told it."""
    return getattr(layer, "gcu_kind", default)


# (parameter, tensor, further arguments of a weight loader) -> what was loaded, and how many parts that is.
Parts = Callable[[torch.nn.Parameter, torch.Tensor, tuple, dict], tuple[object, int]]
# Formats that fill parameters without their weight loaders.
UNSEEN = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer")
WHOLE = 1 << 30  # as many parts as any parameter has


def of_linear(param: torch.nn.Parameter, loaded_weight: torch.Tensor, args: tuple, kwargs: dict) -> tuple[object, int]:
    """The part of a merged layer, or several as a tuple; all of it where there is none."""
    part = next(iter((*args, *kwargs.values())), None)
    return part, WHOLE if part is None else len(part) if isinstance(part, tuple) else 1


def checked(load: Callable, name: str, kind: str, parts: Parts = of_linear) -> Callable:
    """The weight loader `load` of a layer; a tensor that does not fit is an error that names layer and format.

    Which `parts` of a parameter were loaded is noted on it, for `check_complete`.
    """

    def loader(param, loaded_weight, *args, **kwargs):
        try:
            found = load(param, loaded_weight, *args, **kwargs)
        except GcuCompileError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"{name} ({kind}): a tensor of {list(loaded_weight.shape)} does not fit its place, {list(param.shape)} "
                "in this process; truncated?"
            ) from error
        part, count = parts(param, loaded_weight, args, kwargs)
        param.gcu_parts = {**getattr(param, "gcu_parts", {}), part: count}
        return found

    loader.load_format = get_current_vllm_config().load_config.load_format
    return loader


def load_format(parameter: torch.nn.Parameter) -> str | None:
    """How the parameter is filled; None: by a loader that is not `checked`, which a model put in its place."""
    return getattr(getattr(parameter, "weight_loader", None), "load_format", None)


def are_random(parameter: torch.nn.Parameter) -> bool:
    """Whether it is no checkpoint's (`load_format` dummy): scales may be negative."""
    return load_format(parameter) == "dummy"


def check_complete(
    layer: torch.nn.Module, names: Iterable[str], parts: int, name: str, kind: str
) -> None:
    """Raise where a checkpoint lacks a tensor, or a part of one: vLLM leaves what was in memory, and says nothing.

    Args:
        names: of the parameters that a checkpoint must fill.
        parts: how many each is loaded in, where it is not loaded whole.
    """
    for parameter in names:
        if load_format(getattr(layer, parameter)) in (None, *UNSEEN):
            continue
        count = sum(getattr(getattr(layer, parameter), "gcu_parts", {}).values())
        if count < parts:
            lacking = f"{parts - count} of the {parts} parts of {parameter}" if parts > 1 else parameter
            raise CheckpointError(f"{name} ({kind}): the checkpoint lacks {lacking}")


def loader_of(layer: torch.nn.Module, given: Callable) -> Callable:
    """The weight loader of a linear layer, or of a head: vLLM's for heads takes outputs to be a tensor's rows."""
    if not isinstance(layer, ParallelLMHead):
        return given

    def load(parameter, loaded):
        if getattr(parameter, "output_dim", None) != 1:
            return given(parameter, loaded)
        unit = parameter.packed_factor if getattr(parameter, "packed_dim", None) == 1 else 1
        begin, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        if loaded.shape[1] * unit != layer.org_vocab_size:
            raise RuntimeError("not the whole vocabulary")
        parameter.data.zero_()
        parameter.data[:, : (end - begin) // unit] = loaded[:, begin // unit : end // unit]

    return load


def put(layer: torch.nn.Module, linear: formats.Linear, drop: tuple[str, ...]) -> None:
    """The prepared tensors as parameters of `layer`, those of the checkpoint removed."""
    for name in drop:
        layer._parameters.pop(name, None)
    layer.gcu_layout = linear.layout
    for name in TENSORS:
        keep(layer, f"gcu_{name}", getattr(linear, name))
    if absorbed(layer):  # vLLM applies it to an identity, and looks up a device by this name
        layer.weight_packed = layer.gcu_weight
    progress.done(name_of(layer))


def absorbed(layer: torch.nn.Module) -> bool:
    """Whether latent attention takes this projection (`kv_b_proj`) apart, as numbers, when it has been loaded."""
    return getattr(layer, "_cpu_skip_gemm_dispatch", False)


def keep(layer: torch.nn.Module, name: str, value: torch.Tensor | None) -> None:
    """`value` as a parameter of `layer` that is not trained."""
    layer.register_parameter(name, None if value is None else Parameter(value, requires_grad=False))


def apply(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The weight-only layer on x [..., K]."""
    if layer.gcu_order is not None:
        x = x.index_select(-1, layer.gcu_order)
    weight = (layer.gcu_weight, layer.gcu_scales, layer.gcu_zeros, layer.gcu_g_idx)
    if not torch.compiler.is_compiling():
        return torch.ops.gcu.dequant_gemm.default(x, *weight, bias, layout=layer.gcu_layout)
    numbers = eager.dequantise(*weight, layer.gcu_layout, x.shape[-1])
    return torch.nn.functional.linear(x, numbers.to(x.dtype), bias)


def known_activations(layer: torch.nn.Module, scale: torch.Tensor | None, zero: torch.Tensor | None) -> None:
    """Scale and zero of statically quantised activations, one each; None: they are quantised per token."""
    keep(layer, "gcu_x_scale", scale)
    keep(layer, "gcu_x_zero", zero)


def apply_int8(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None, symmetric: bool) -> torch.Tensor:
    """The layer with int8 weights and activations on x [..., K]."""
    if absorbed(layer):  # its weight is asked for; an identity in int8 would be of what a scale makes of 1
        return apply(layer, x, bias)
    weight = (layer.gcu_weight, layer.gcu_scales)
    known = {"bias": bias, "layout": layer.gcu_layout, "out_dtype": x.dtype}
    if layer.gcu_x_scale is None and not symmetric:
        codes, scales, zeros = torch.ops.gcu.quantize_per_token.default(x, 0, False)
        return torch.ops.gcu.int8_gemm.default(codes, *weight, scales, zeros, **known)
    return torch.ops.gcu.int8_gemm.default(x, *weight, layer.gcu_x_scale, layer.gcu_x_zero, **known)
