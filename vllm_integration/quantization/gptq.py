"""GPTQ of 4 and 8 bits: first and second form of the zeros, symmetric or not, any order of the inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, get_moe_quant_method
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_linear_quant_method
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

from gcu_compile.errors import CheckpointError, UnsupportedFeatureError
from gcu_compile.kernels.dequant_gemm import formats
from vllm_integration.quantization import experts
from vllm_integration.quantization import layer as layers
from vllm_integration.quantization.layer import ACTIVATIONS, HOST


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
        if isinstance(layer, RoutedExperts):
            method = get_moe_quant_method(self, layer, prefix, experts.GPTQExperts)
            method.prefix = prefix
            return method
        return super().get_quant_method(layer, prefix)


def same_groups(load: Callable, name: str) -> Callable:
    """The weight loader of g_idx [K]: the parts of a merged layer have the same inputs, and must have them in the same
    groups."""

    def loader(param, loaded_weight, *part):
        known = getattr(param, "gcu_parts", {})
        before = param.data.clone() if part and known and part[0] not in known else None
        load(param, loaded_weight, *part)
        if before is not None and not torch.equal(before, param.data):
            raise CheckpointError(f"{name} (GPTQ): its merged parts have the same inputs, and different g_idx")

    return loader


@register_weight_loader_v2_supported_method
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
        odd = [part for part in output_partition_sizes if part % per_word]
        size = self.config.group_size if self.config.group_size != -1 else input_size
        # A shard of the inputs has the groups that it cuts; with act-order any input may belong to any group.
        whole = k != input_size and (self.config.act_order or self.config.group_size == -1)
        if k % per_word or odd or input_size % size or (not whole and k % size):
            raise CheckpointError(
                f"{self.prefix} (GPTQ int{self.bits}): groups of {size} and words of {per_word} codes do not divide "
                f"{k} of {input_size} inputs and {output_partition_sizes} outputs"
            )
        groups = input_size // size if whole else k // size
        load = layers.loader_of(layer, extra["weight_loader"])
        loader = {"weight_loader": layers.checked(load, self.prefix, f"GPTQ int{self.bits}")}
        packing = {"packed_factor": per_word, **loader}
        qweight = torch.empty(k // per_word, n, dtype=torch.int32)
        layer.register_parameter(
            "qweight", PackedvLLMParameter(data=qweight, input_dim=0, output_dim=1, packed_dim=0, **packing)
        )
        grouped = layers.checked(same_groups(load, self.prefix), self.prefix, f"GPTQ int{self.bits}")
        g_idx = torch.arange(k, dtype=torch.int32) // size
        layer.register_parameter("g_idx", RowvLLMParameter(data=g_idx, input_dim=0, weight_loader=grouped))
        # The checkpoint's float16 scales would be rounded by a model's bfloat16; float32 holds them all.
        scales = {"data": torch.empty(groups, n, dtype=torch.float32), **loader}
        qzeros = {"data": torch.empty(groups, n // per_word, dtype=torch.int32), "packed_dim": 1, **packing}
        if whole:
            layer.register_parameter("scales", ChannelQuantScaleParameter(output_dim=1, **scales))
            layer.register_parameter("qzeros", PackedColumnParameter(output_dim=1, **qzeros))
        else:
            layer.register_parameter("scales", GroupQuantScaleParameter(input_dim=0, output_dim=1, **scales))
            layer.register_parameter("qzeros", PackedvLLMParameter(input_dim=0, output_dim=1, **qzeros))
        self.parts = sum(map(bool, output_partition_sizes))  # a merged layer may have none of a kind
        layers.expect("dequant_gemm")

    def process_weights_after_loading(self, layer) -> None:
        needed = ["qweight", "scales", *(["qzeros"] * (not self.config.is_sym)), *(["g_idx"] * self.config.act_order)]
        layers.check_complete(layer, needed, self.parts, self.prefix, f"GPTQ int{self.bits}")
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
            self._groups(layer.g_idx.data),
            layers.target(layer.qweight, self.bits),
        )
        layers.put(layer, linear, ("qweight", "qzeros", "scales", "g_idx"))

    def _groups(self, g_idx: torch.Tensor) -> torch.Tensor | None:
        """`g_idx` where the inputs are in an order of their own; None where neighbours share a group."""
        if self.config.act_order:
            return g_idx
        size = self.config.group_size if self.config.group_size != -1 else len(g_idx)
        if not torch.equal(g_idx - g_idx[0], torch.arange(len(g_idx), dtype=g_idx.dtype) // size):
            raise CheckpointError(
                f"{self.prefix} (GPTQ int{self.bits}): g_idx is not in order, and the configuration says desc_act false"
            )
        return None

    def apply(self, layer, x, bias=None):
        return layers.apply(layer, x, bias)
