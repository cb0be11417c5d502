"""AWQ of 4 bits. vLLM brings the words into GPTQ's order and hands them to the first kernel of its list: ours."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from gcu_compile.errors import CheckpointError
from vllm_integration.quantization import experts
from vllm_integration.quantization import layer as layers
from vllm_integration.quantization.layer import ACTIVATIONS


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
        if not isinstance(method, AutoAWQMarlinLinearMethod):
            return method
        ours = AWQLinearMethod(self)
        ours.prefix = prefix
        return ours


@register_weight_loader_v2_supported_method
class AWQLinearMethod(AutoAWQMarlinLinearMethod):
    """vLLM's method, whose kernel is ours."""

    prefix = ""

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra
    ) -> None:
        size = self.quant_config.group_size if self.quant_config.group_size != -1 else input_size
        per_word = self.quant_config.pack_factor
        odd = [n for n in output_partition_sizes if n % per_word]
        if input_size_per_partition % size or odd:
            raise CheckpointError(
                f"{self.prefix} (AWQ int4): groups of {size} and words of {per_word} codes do not divide "
                f"{input_size_per_partition} of {input_size} inputs and {output_partition_sizes} outputs"
            )
        load = layers.loader_of(layer, extra["weight_loader"])
        extra["weight_loader"] = layers.checked(load, self.prefix, "AWQ int4")
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype=torch.float32,  # the checkpoint's float16 scales would be rounded by a model's bfloat16
            **extra,
        )
        layers.expect("dequant_gemm")
