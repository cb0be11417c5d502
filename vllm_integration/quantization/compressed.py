"""compressed-tensors: vLLM's schemes with our kernels, experts on our grouped products, an int8 KV cache."""

from __future__ import annotations

import torch
from compressed_tensors import CompressionFormat
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearKernel
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding import (
    CompressedTensorsEmbeddingWNA16Int,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Int8,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise
from vllm.model_executor.parameter import PerTensorScaleParameter

from gcu_compile.errors import CheckpointError, UnsupportedFeatureError
from gcu_compile.kernels.dequant_gemm import eager, formats
from vllm_integration.quantization import cache, experts
from vllm_integration.quantization import layer as layers
from vllm_integration.quantization.kv_scales import Int8KVCacheMethod
from vllm_integration.quantization.layer import BITS

# What a checkpoint holds of a linear layer, as far as its scheme has it.
TENSORS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


class CompressedConfig(CompressedTensorsConfig):
    """vLLM's configuration, for int8 caches and experts too."""

    def get_quant_method(self, layer, prefix):
        if isinstance(layer, RoutedExperts):
            method = self._experts(layer, prefix)
            return method if method is not None else self._vllm_experts(layer, prefix)
        if isinstance(layer, Attention) and cache.is_int8(self.kv_cache_scheme):
            return None if self.kv_cache_scheme.get("dynamic") else Int8KVCacheMethod(self)
        method = super().get_quant_method(layer, prefix)
        if type(method) is CompressedTensorsLinearMethod:
            layer.prefix = prefix  # heads have none of their own
            method = CompressedLinearMethod(self)
        if type(method) is CompressedTensorsEmbeddingWNA16Int:
            method = PackedEmbedding(self.get_scheme_dict(layer, layer_name=prefix)["weights"])
        return method

    def _experts(self, layer, prefix: str):
        """Our method for experts whose three projections share a scheme that we have; None: vLLM's."""
        self._add_fused_moe_to_target_scheme_map()
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        schemes = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names if name]
        if schemes[0] is None or any(scheme != schemes[0] for scheme in schemes):
            return None
        weights, inputs = schemes[0].get("weights"), schemes[0].get("input_activations")
        packed = schemes[0].get("format") == CompressionFormat.pack_quantized.value
        if packed and weights.num_bits in (4, 8) and self._is_wNa16_group_channel(weights, inputs):
            return experts.PackedExperts(weights, layer.moe_config, prefix)
        if inputs is not None and weights.type == inputs.type == "int" and weights.num_bits == inputs.num_bits == 8:
            if not (self._is_dynamic_token_w8a8(weights, inputs) or self._is_static_tensor_w8a8(weights, inputs)):
                raise UnsupportedFeatureError(
                    f"{prefix} (compressed-tensors W8A8 experts): weights {_in_words(weights)}, activations "
                    f"{_in_words(inputs)}; expected symmetric weights, per channel or tensor, and activations that are "
                    "dynamic per token or static per tensor"
                )
            return experts.Int8Experts(weights, inputs, layer.moe_config, prefix)
        return None

    def _vllm_experts(self, layer, prefix: str):
        """vLLM's method; what it does not take is told of by layer and format."""
        try:
            return super().get_quant_method(layer, prefix)
        except Exception as error:  # of any class, where no scheme fits
            kind, what = f"compressed-tensors {self.quant_format} experts", f"{type(error).__name__}: {error}"
            raise UnsupportedFeatureError(f"{prefix} ({kind}): vLLM has no method for this scheme: {what}") from error


def _in_words(args) -> str:
    kind = f"{'symmetric' if args.symmetric else 'asymmetric'} per {getattr(args.strategy, 'value', args.strategy)}"
    return f"{kind} ({'dynamic' if args.dynamic else 'static'})"


@register_weight_loader_v2_supported_method
class CompressedLinearMethod(CompressedTensorsLinearMethod):
    """vLLM's method; what does not fit is told of by layer and format."""

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ) -> None:
        scheme = layer.scheme
        kind = f"compressed-tensors {self.quantization_config.quant_format}"
        layer.gcu_kind = kind + (f" int{scheme.num_bits}" if isinstance(scheme, CompressedTensorsWNA16) else " int8")
        extra["weight_loader"] = layers.checked(extra["weight_loader"], layer.prefix, kind)
        if isinstance(scheme, CompressedTensorsWNA16):
            params_dtype = torch.float32  # float16 scales would be rounded by a model's bfloat16
            per_word = 32 // scheme.num_bits
            if not scheme.symmetric and any(part % per_word for part in output_partition_sizes):
                raise CheckpointError(
                    f"{layer.prefix} ({kind}): words of {per_word} zeros do not divide {output_partition_sizes} outputs"
                )
        sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
        try:
            super().create_weights(layer, *sizes, params_dtype, **extra)
        except ValueError as error:  # no kernel for the sizes, groups across shards
            raise CheckpointError(f"{layer.prefix} ({kind}): {error}") from error
        self.parts = sum(map(bool, output_partition_sizes))
        for name in ("input_scale", "input_zero_point"):
            if self.parts > 1 and isinstance(scheme, CompressedTensorsW8A8Int8) and getattr(layer, name) is not None:
                # vLLM has room for one: the last part's would stay.
                each = getattr(layer, name).new_zeros(len(output_partition_sizes))
                loader = extra["weight_loader"]
                layer.register_parameter(name, PerTensorScaleParameter(data=each, weight_loader=loader))

    def process_weights_after_loading(self, layer) -> None:
        if isinstance(layer.scheme, (CompressedTensorsWNA16, CompressedTensorsW8A8Int8)):
            needed = [name for name in TENSORS if getattr(layer, name, None) is not None]
            layers.check_complete(layer, needed, self.parts, layer.prefix, layer.gcu_kind)
        super().process_weights_after_loading(layer)


class PackedEmbedding(CompressedTensorsEmbeddingWNA16Int):
    """vLLM's quantised embedding, whose look-up is a Triton kernel, in plain torch."""

    def embedding(self, layer, input_: torch.Tensor) -> torch.Tensor:
        """Rows of the table: tokens [...] -> [..., hidden]."""
        ids = input_.reshape(-1)
        packed, scales = layer.weight_packed[ids], layer.weight_scale[ids]
        hidden = layer.hidden_size
        numbers = eager.dequantise(packed, scales.T, None, None, f"int{self.num_bits}_rows_i32", hidden)
        return numbers.to(scales.dtype).view(*input_.shape, hidden)


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
        layers.expect("dequant_gemm")
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
            layers.name_of(layer),
            layers.kind_of(layer, f"int{bits}, packed"),
            f"int{bits}_rows_i32" if rows else f"gptq_int{bits}",
            weight.data.contiguous(),
            scale,
            zero,
            target=layers.target(weight, bits),
        )
        layers.put(layer, linear, tuple(filter(None, (self.w_q_name, self.w_s_name, self.w_zp_name))))

    def apply_weights(self, layer, x, bias=None):
        return layers.apply(layer, x, bias)


class Int8Kernel(Int8ScaledMMLinearKernel):
    """W8A8: activations quantised per token in the kernel, or by a known scale."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c) -> tuple[bool, str | None]:
        layers.expect("int8_gemm")
        return True, None

    def process_weights_after_loading(self, layer) -> None:
        w_name, s_name, x_name, zero_name, _ = self.layer_param_names
        weight, scales = getattr(layer, w_name).data, getattr(layer, s_name).data
        n, k = weight.shape
        if not self.config.is_channelwise:
            scales = convert_to_channelwise(scales, layer.logical_widths)
        name, kind = layers.name_of(layer), layers.kind_of(layer, "int8")
        scales = scales.float().reshape(1, n)
        linear = formats.prepare(
            name, kind, "int8_rows", weight, scales, target=layers.target(weight, 8), inputs=k
        )
        x_scale, x_zero = getattr(layer, x_name, None), getattr(layer, zero_name, None)
        known = None, None
        if self.config.is_static_input_scheme:
            zeros = None if self.config.input_symmetric else x_zero.data
            if layers.are_random(x_scale):
                x_scale.data.abs_().clamp_(min=1e-3)
            known = formats.static_range(name, kind, x_scale.data, zeros)
        layers.put(layer, linear.of_integers(), (w_name, s_name, x_name, zero_name))
        layers.known_activations(layer, *known)

    def apply_weights(self, layer, x, bias=None):
        return layers.apply_int8(layer, x, bias, self.config.input_symmetric)

    def _get_layer_params(self, layer):
        return layer.gcu_weight, layer.gcu_scales, layer.gcu_x_scale, layer.gcu_x_zero, None
