"""AWQ of 4 bits."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from gcu_compile.errors import CheckpointError
from gcu_compile.kernels.dequant_gemm import formats
from vllm_integration.quantization import experts
from vllm_integration.quantization import layer as layers
from vllm_integration.quantization.layer import ACTIVATIONS

KIND = "AWQ int4"


class AWQConfig(AutoAWQConfig):
    """vLLM's AWQ with float32 activations, unrounded scales, and experts on our grouped product."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return ACTIVATIONS

    def get_quant_method(self, layer, prefix):
        if isinstance(layer, RoutedExperts) and not is_layer_skipped(
            prefix, self.modules_to_not_convert, self.packed_modules_mapping, match_mode="substring"
        ):
            return experts.AWQExperts(self, layer.moe_config, prefix)
        method = super().get_quant_method(layer, prefix)
        return AWQLinearMethod(self, prefix) if isinstance(method, AutoAWQMarlinLinearMethod) else method


@register_weight_loader_v2_supported_method
class AWQLinearMethod(LinearMethodBase):
    """An AWQ layer: qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]. Words are repacked as they lie: vLLM's way to
    GPTQ's order goes through several tensors of a word for each code."""

    def __init__(self, quant_config: AWQConfig, prefix: str) -> None:
        self.config, self.prefix = quant_config, prefix

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ) -> None:
        k, n, per_word = input_size_per_partition, sum(output_partition_sizes), self.config.pack_factor
        size = self.config.group_size if self.config.group_size != -1 else input_size
        whole = k != input_size and self.config.group_size == -1  # a scale per output, on every shard of the inputs
        odd = [part for part in output_partition_sizes if part % per_word]
        if odd or input_size % size or (not whole and k % size):
            raise CheckpointError(
                f"{self.prefix} ({KIND}): groups of {size} and words of {per_word} codes do not divide "
                f"{k} of {input_size} inputs and {output_partition_sizes} outputs"
            )
        load = layers.loader_of(layer, extra["weight_loader"])
        loader = {"weight_loader": layers.checked(load, self.prefix, KIND), "output_dim": 1}
        packing = {"packed_dim": 1, "packed_factor": per_word, **loader}
        groups = 1 if whole else k // size
        qweight = torch.empty(k, n // per_word, dtype=torch.int32)
        layer.register_parameter("qweight", PackedvLLMParameter(data=qweight, input_dim=0, **packing))
        # The checkpoint's float16 scales would be rounded by a model's bfloat16; float32 holds them all.
        scales = {"data": torch.empty(groups, n, dtype=torch.float32), **loader}
        qzeros = {"data": torch.empty(groups, n // per_word, dtype=torch.int32), **packing}
        if whole:
            layer.register_parameter("scales", ChannelQuantScaleParameter(**scales))
            layer.register_parameter("qzeros", PackedColumnParameter(**qzeros))
        else:
            layer.register_parameter("scales", GroupQuantScaleParameter(input_dim=0, **scales))
            layer.register_parameter("qzeros", PackedvLLMParameter(input_dim=0, **qzeros))
        self.parts = sum(map(bool, output_partition_sizes))  # a merged layer may have none of a kind
        layers.expect("dequant_gemm")

    def process_weights_after_loading(self, layer) -> None:
        needed = ("qweight", "scales", *(["qzeros"] * self.config.zero_point))
        layers.check_complete(layer, needed, self.parts, self.prefix, KIND)
        weight, scales, zeros = layer.qweight.data, layer.scales.data, None
        if self.config.zero_point:
            zeros = formats.awq_zeros(layer.qzeros.data, *scales.shape)
        target = layers.target(weight, 4)
        linear = formats.prepare(self.prefix, KIND, "awq_int4", weight, scales, zeros, target=target)
        layers.put(layer, linear, ("qweight", "qzeros", "scales"))

    def apply(self, layer, x, bias=None):
        return layers.apply(layer, x, bias)
