"""Quantised linears of vLLM on `gcu::dequant_gemm` and `gcu::int8_gemm`, chosen from the checkpoint by vLLM itself.

    GPTQ int4/int8, v1/v2 zeros, symmetric or not, desc_act   GPTQConfig (in the place of vLLM's)
    AWQ int4                                                  AWQConfig  (in the place of vLLM's)
    compressed-tensors W4A16, W8A16 (pack-quantized)          MixedPrecisionKernel, first of vLLM's list
    compressed-tensors W8A8 int8, static or dynamic           Int8Kernel, first of vLLM's list

A weight is repacked once, when its layer has been loaded: one layer's copy exists at a time. While a graph is
traced, a layer is written as what it means (unpack, subtract, scale, matmul), and the compiler's rule makes the
operation of it; a call outside of a graph is that operation directly.
"""

from __future__ import annotations

import torch
from torch.nn import Parameter
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearKernel
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)
from vllm.scalar_type import scalar_types

import gcu_compile.kernels.dequant_gemm  # noqa: F401  (defines the operations)
from gcu_compile.errors import CheckpointError, UnsupportedFeatureError
from gcu_compile.kernels.dequant_gemm import eager, formats
from vllm_integration import vllm_private

ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
# Layouts that the kernels of a device read: C++ on the CPU, Triton elsewhere.
HOST, CARD = {4: "host_int4", 8: "host_int8"}, {4: "gptq_int4", 8: "int8_columns"}
BITS = {scalar_types.uint4: 4, scalar_types.uint4b8: 4, scalar_types.uint8: 8, scalar_types.uint8b128: 8}


def _target(weight: torch.Tensor, bits: int) -> str:
    return (HOST if weight.device.type == "cpu" else CARD)[bits]


def _put(layer: torch.nn.Module, linear: formats.Linear, drop: tuple[str, ...]) -> None:
    """The prepared tensors as parameters of `layer`, those of the checkpoint removed."""
    for name in drop:
        layer._parameters.pop(name, None)
    layer.gcu_layout = linear.layout
    for name in ("weight", "scales", "zeros", "g_idx", "order"):
        value = getattr(linear, name)
        layer.register_parameter(f"gcu_{name}", None if value is None else Parameter(value, requires_grad=False))


def _apply(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The layer on [..., K]."""
    if layer.gcu_order is not None:
        x = x.index_select(-1, layer.gcu_order)
    weight = (layer.gcu_weight, layer.gcu_scales, layer.gcu_zeros, layer.gcu_g_idx)
    if not torch.compiler.is_compiling():
        return torch.ops.gcu.dequant_gemm(x, *weight, bias, layout=layer.gcu_layout)
    numbers = eager.dequantise(*weight, layer.gcu_layout, x.shape[-1])
    return torch.nn.functional.linear(x, numbers.to(x.dtype), bias)


class GPTQConfig(AutoGPTQConfig):
    """vLLM's GPTQ with float32 activations, asymmetric zeros and desc_act, none of which it has on a CPU."""

    TYPE_MAP = {
        (4, True): scalar_types.uint4b8,
        (8, True): scalar_types.uint8b128,
        (4, False): scalar_types.uint4,
        (8, False): scalar_types.uint8,
    }

    def __init__(self, weight_bits, group_size, desc_act, is_sym, lm_head_quantized, dynamic, full_config, *args):
        # vLLM refuses groups with act-order; its own check must not see it.
        super().__init__(weight_bits, group_size, False, is_sym, lm_head_quantized, dynamic, full_config, *args)
        self.act_order = desc_act and group_size != -1
        form = str(full_config.get("checkpoint_format") or full_config.get("format") or "gptq")
        if form not in ("gptq", "gptq_v2"):
            raise UnsupportedFeatureError(f"GPTQ checkpoint_format {form!r}: expected 'gptq' or 'gptq_v2'")
        self.plus_one = form == "gptq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return ACTIVATIONS

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Nothing is renamed; vLLM's drops every g_idx."""
        return WeightsMapper()

    def get_quant_method(self, layer, prefix):
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            method = get_linear_quant_method(self, layer, prefix, GPTQLinearMethod)
            if isinstance(method, GPTQLinearMethod):
                method.prefix = prefix
            return method
        return super().get_quant_method(layer, prefix)


class GPTQLinearMethod(LinearMethodBase):
    """A GPTQ layer: qweight [K / c, N], qzeros [G, N / c], scales [G, N], g_idx [K], with c codes in 32 bits."""

    prefix = ""

    def __init__(self, quant_config: GPTQConfig) -> None:
        self.config = quant_config
        self.bits = quant_config.quant_type.size_bits
        if self.bits not in HOST:
            raise UnsupportedFeatureError(f"GPTQ with {self.bits} bits: expected 4 or 8")

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ) -> None:
        k, n, per_word = input_size_per_partition, sum(output_partition_sizes), 32 // self.bits
        size = self.config.group_size if self.config.group_size != -1 else input_size
        # A shard of the inputs has the groups that it cuts; with act-order any input may belong to any group.
        whole = k != input_size and (self.config.act_order or self.config.group_size == -1)
        if k % per_word or n % per_word or input_size % size or (not whole and k % size):
            raise CheckpointError(
                f"{self.prefix} (GPTQ int{self.bits}): groups of {size} and words of {per_word} codes do not divide "
                f"{k} of {input_size} inputs and {n} outputs"
            )
        groups = input_size // size if whole else k // size
        loader = {"weight_loader": extra.get("weight_loader")}
        packing = {"packed_factor": per_word, **loader}
        qweight = torch.empty(k // per_word, n, dtype=torch.int32)
        layer.register_parameter(
            "qweight", PackedvLLMParameter(data=qweight, input_dim=0, output_dim=1, packed_dim=0, **packing)
        )
        layer.register_parameter(
            "g_idx", RowvLLMParameter(data=torch.arange(k, dtype=torch.int32) // size, input_dim=0, **loader)
        )
        # The checkpoint's float16 scales would be rounded by a model's bfloat16; float32 holds them all.
        scales = {"data": torch.empty(groups, n, dtype=torch.float32), **loader}
        qzeros = {"data": torch.empty(groups, n // per_word, dtype=torch.int32), "packed_dim": 1, **packing}
        if whole:
            layer.register_parameter("scales", ChannelQuantScaleParameter(output_dim=1, **scales))
            layer.register_parameter("qzeros", PackedColumnParameter(output_dim=1, **qzeros))
        else:
            layer.register_parameter("scales", GroupQuantScaleParameter(input_dim=0, output_dim=1, **scales))
            layer.register_parameter("qzeros", PackedvLLMParameter(input_dim=0, output_dim=1, **qzeros))

    def process_weights_after_loading(self, layer) -> None:
        scales = layer.scales.data
        zeros = None
        if not self.config.is_sym:
            zeros = formats.packed_zeros(layer.qzeros.data, self.bits, *scales.shape, self.config.plus_one)
        linear = formats.prepare(
            self.prefix,
            f"GPTQ int{self.bits}",
            f"gptq_int{self.bits}",
            layer.qweight.data,
            scales,
            zeros,
            layer.g_idx.data if self.config.act_order else None,
            _target(layer.qweight, self.bits),
        )
        _put(layer, linear, ("qweight", "qzeros", "scales", "g_idx"))

    def apply(self, layer, x, bias=None):
        return _apply(layer, x, bias)


class AWQConfig(AutoAWQConfig):
    """vLLM's AWQ with float32 activations and unrounded scales."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return ACTIVATIONS

    def get_quant_method(self, layer, prefix):
        method = super().get_quant_method(layer, prefix)
        return AWQLinearMethod(self) if isinstance(method, AutoAWQMarlinLinearMethod) else method


class AWQLinearMethod(AutoAWQMarlinLinearMethod):
    """vLLM's method, whose kernel is ours by the list below."""

    def create_weights(self, layer, *args, params_dtype, **extra) -> None:
        super().create_weights(layer, *args, params_dtype=torch.float32, **extra)


class MixedPrecisionKernel(MPLinearKernel):
    """int4 and int8 weights in the form that vLLM hands to its kernels: words packed along the inputs."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c) -> tuple[bool, str | None]:
        if c.weight_type not in BITS:
            return False, f"weights of {c.weight_type}; expected 4 or 8 bits"
        k, size = c.partition_weight_shape[0], c.group_size
        if size > 0 and c.full_weight_shape[0] % size:
            return False, f"groups of {size} do not divide {c.full_weight_shape[0]} inputs"
        if k % (32 // BITS[c.weight_type]):
            return False, f"{k} inputs do not fill words of 32 bits"
        return True, None

    def process_weights_after_loading(self, layer) -> None:
        bits = BITS[self.config.weight_type]
        weight, scales, zeros = self._get_weight_params(layer)
        rows = weight.input_dim == 1  # compressed-tensors: [N, K / c]
        scale = scales.data.T if scales.output_dim == 0 else scales.data
        groups, n = scale.shape
        zero = None
        if self.config.zero_points:
            words = zeros.data if zeros.output_dim == 0 else zeros.data.T  # [N / c, G]
            zero = formats.packed_zeros(words.T.contiguous(), bits, groups, n)
        linear = formats.prepare(
            getattr(layer, "prefix", type(layer).__name__),
            f"int{bits}, packed",
            f"int{bits}_rows_i32" if rows else f"gptq_int{bits}",
            weight.data.contiguous(),
            scale,
            zero,
            target=_target(weight, bits),
        )
        _put(layer, linear, tuple(filter(None, (self.w_q_name, self.w_s_name, self.w_zp_name))))

    def apply_weights(self, layer, x, bias=None):
        return _apply(layer, x, bias)


class Int8Kernel(Int8ScaledMMLinearKernel):
    """W8A8: activations quantised per token in the kernel, or by a known scale."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer) -> None:
        w_name, s_name, x_name, zero_name, _ = self.layer_param_names
        weight, scales = getattr(layer, w_name).data, getattr(layer, s_name).data
        n, k = weight.shape
        if not self.config.is_channelwise:
            scales = convert_to_channelwise(scales, layer.logical_widths)
        name = getattr(layer, "prefix", type(layer).__name__)
        linear = formats.prepare(
            name, "int8", "int8_rows", weight, scales.float().reshape(1, n), target=_target(weight, 8), inputs=k
        )
        x_scale, x_zero = getattr(layer, x_name, None), getattr(layer, zero_name, None)
        known = None, None
        if self.config.is_static_input_scheme:
            known = _static(x_scale.data, None if self.config.input_symmetric else x_zero.data)
        _put(layer, linear, (w_name, s_name, x_name, zero_name))
        for key, value in zip(("gcu_x_scale", "gcu_x_zero"), known, strict=True):
            layer.register_parameter(key, None if value is None else Parameter(value, requires_grad=False))

    def apply_weights(self, layer, x, bias=None):
        weight = (layer.gcu_weight, layer.gcu_scales)
        known = {"bias": bias, "layout": layer.gcu_layout, "out_dtype": x.dtype}
        if layer.gcu_x_scale is None and not self.config.input_symmetric:
            codes, scales, zeros = torch.ops.gcu.quantize_per_token(x, 0, False)
            return torch.ops.gcu.int8_gemm(codes, *weight, scales, zeros, **known)
        return torch.ops.gcu.int8_gemm(x, *weight, layer.gcu_x_scale, layer.gcu_x_zero, **known)

    def _get_layer_params(self, layer):
        return layer.gcu_weight, layer.gcu_scales, layer.gcu_x_scale, layer.gcu_x_zero, None


def _static(scales: torch.Tensor, zeros: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One scale (and zero) for a merged layer whose parts were calibrated apart: the union of their ranges."""
    scales = scales.float().reshape(-1)
    if zeros is None:
        return scales.max().reshape(1), None
    zeros = zeros.to(torch.int32).reshape(-1)
    high, low = (scales * (127 - zeros)).max(), (scales * (-128 - zeros)).min()
    scale = (high - low) / 255.0
    return scale.reshape(1), torch.round(-128 - low / scale).to(torch.int32).reshape(1)


def install() -> None:
    """Put our configurations and kernels in place of vLLM's. Idempotent."""
    configs = dict.fromkeys(("gptq", "gptq_marlin", "auto_gptq"), GPTQConfig)
    vllm_private.replace_quantization_configs(configs | dict.fromkeys(("awq", "awq_marlin", "auto_awq"), AWQConfig))
    vllm_private.prefer_linear_kernels(MixedPrecisionKernel, Int8Kernel)
