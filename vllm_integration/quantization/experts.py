"""The experts of a mixture on `gcu_composite::fused_experts`.

vLLM's own classes make and load the parameters of each format (`create_weights`); what follows the loading is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import compress

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 import (  # noqa: E501
    CompressedTensorsW8A8Int8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)

import gcu_compile.kernels.dequant_gemm.experts  # noqa: F401 - defines the operation
from gcu_compile.errors import CheckpointError, UnsupportedFeatureError
from gcu_compile.kernels.dequant_gemm import formats
from vllm_integration.quantization import layer as layers
from vllm_integration.quantization import progress

PARTS = ("w13", "w2")  # gate and up, one above the other; down
TENSORS = ("weight", "scales", "zeros", "g_idx")
OF_X = ("scales", "zeros")  # of activations that are known before
ACTIVATIONS = {MoEActivation.SILU: "silu", MoEActivation.GELU: "gelu", MoEActivation.GELU_TANH: "gelu_tanh"}


def whole(expert_data: torch.Tensor, loaded_weight: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Where a tensor goes: all of it, which the tensor must fill."""
    if loaded_weight.ndim > 0 and expert_data.shape != loaded_weight.shape:
        raise RuntimeError("the tensor does not fill its place")
    return expert_data


class Experts(FusedMoEMethodBase):
    """What the formats share. `process_weights_after_loading` leaves gcu_w13_* and gcu_w2_* on the layer."""

    prefix = ""
    kind = ""  # of the checkpoint, for messages
    libraries = ("dequant_gemm", "route", "weighted_sum")  # of the host's kernels
    int8 = False  # whether activations are
    symmetric_inputs = True  # whether those that are quantised per token have no zeros

    def __init__(self, moe, prefix: str = "") -> None:
        FusedMoEMethodBase.__init__(self, moe)  # the formats' own __init__ choose kernels that a CPU has not
        self.prefix = prefix
        if moe.activation not in ACTIVATIONS or not moe.is_act_and_mul:
            known = ", ".join(activation.value for activation in ACTIVATIONS)
            raise UnsupportedFeatureError(
                f"{prefix}: quantised experts with activation {moe.activation.value!r}; expected one of {known}"
            )
        if getattr(moe, "swiglu_limit", None) is not None:
            raise UnsupportedFeatureError(f"{prefix}: quantised experts with a limit on the activation (swiglu_limit)")

    @property
    def is_monolithic(self) -> bool:
        return False

    @property
    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def get_fused_moe_quant_config(self, layer):
        return None  # no kernel of vLLM's modular interface

    def create_weights(self, layer, *args, params_dtype, **extra) -> None:
        extra["weight_loader"] = self._checked(layer, extra["weight_loader"])
        super().create_weights(layer, *args, params_dtype=params_dtype, **extra)
        layers.expect(*self.libraries)

    def _checked(self, layer, load: Callable) -> Callable:
        """The experts' weight loader; a tensor that does not fit, or is truncated, is an error.

        vLLM's puts a tensor that is too small into a corner of its place, as if that were padded for a kernel.
        """
        layer._narrow_expert_data_for_padding = whole

        def parts(param, loaded_weight, args, kwargs):
            """Of one expert; or of all, in one tensor (Llama 4), or by a loader of the model's own (DBRX)."""
            expert, shard = kwargs.get("expert_id"), kwargs.get("shard_id")
            if expert is None or loaded_weight.dim() == param.dim() > 1:
                return (shard or args), layer.local_num_experts
            expert = layer._map_global_expert_id_to_local_expert_id(expert)
            return (shard, expert), int(expert >= 0)

        return layers.checked(load, self.prefix or layers.name_of(layer), f"{self.kind} experts", parts)

    def _check_complete(self, layer, names: Iterable[str]) -> None:
        """Raise where the checkpoint lacks a tensor of an expert; `names`: of a part, w13_qweight and so on."""
        for name in names:
            parts = layer.local_num_experts * (2 if name.startswith("w13") else 1)
            layers.check_complete(layer, (name,), parts, self.prefix, f"{self.kind} experts")

    def _put(self, layer, part: str, linears, drop: tuple[str, ...]) -> None:
        """Stack the prepared experts; `linears` makes one at a time, so that one copy exists beside the stack."""
        stacks, count = {}, 0
        for index, linear in enumerate(linears):
            for name in TENSORS:
                value = getattr(linear, name)
                if value is None:
                    continue
                if index == 0:
                    stacks[name] = value.new_empty(layer.local_num_experts, *value.shape)
                if stacks[name].dtype != value.dtype:  # scales are kept in 16 bits where that is exact
                    stacks[name] = stacks[name].to(torch.promote_types(stacks[name].dtype, value.dtype))
                stacks[name][index] = value
            layout, count = linear.layout, count + 1
        if count != layer.local_num_experts:
            raise CheckpointError(f"{self.prefix}: {count} experts, expected {layer.local_num_experts}")
        for name in drop:
            layer._parameters.pop(name, None)
        setattr(layer, f"gcu_{part}_layout", layout)
        for name in TENSORS:
            layers.keep(layer, f"gcu_{part}_{name}", stacks.get(name))

    def _bias(self, layer, part: str) -> torch.Tensor | None:
        """The bias of a part, where the model or the checkpoint has one."""
        name = f"{part}_bias"
        if self.moe.has_bias or name in getattr(layer, "_loaded_expert_biases", ()):
            return getattr(layer, name)
        return None

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        """x [tokens, hidden], topk_weights and topk_ids [tokens, top_k] -> [tokens, hidden]."""
        parts = []
        for part in PARTS:
            parts += [getattr(layer, f"gcu_{part}_{name}", None) for name in TENSORS]
            parts.append(self._bias(layer, part))
        return torch.ops.gcu_composite.fused_experts.default(
            x,
            topk_weights,
            topk_ids,
            *parts,
            layer.expert_map,
            w13_layout=layer.gcu_w13_layout,
            w2_layout=layer.gcu_w2_layout,
            activation=ACTIVATIONS[layer.activation],
            int8=self.int8,
            weights_on_input=layer.apply_router_weight_on_input,
            symmetric=self.symmetric_inputs,
            **{f"{part}_x_{name}": getattr(layer, f"gcu_{part}_x_{name}", None) for part in PARTS for name in OF_X},
        )


class GPTQExperts(Experts, AutoGPTQMoEMethod):
    """GPTQ int4 and int8, any order of the inputs."""

    kind = "GPTQ"

    def __init__(self, quant_config, moe) -> None:
        super().__init__(moe)
        self.quant_config, self.input_dtype = quant_config, None

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra):
        config, sizes = self.quant_config, (num_experts, hidden_size, intermediate_size_per_partition)
        check_groups(self.prefix, "GPTQ", config.group_size, hidden_size, intermediate_size_per_partition)
        if config.act_order and self.moe.moe_parallel_config.tp_size > 1:
            raise UnsupportedFeatureError(
                f"{self.prefix}: GPTQ experts with desc_act in tensor parallel; use expert parallelism"
            )
        super().create_weights(layer, *sizes, params_dtype=torch.float32, **extra)
        for part, inputs in (("w13", hidden_size), ("w2", intermediate_size_per_partition)):
            size = config.group_size if config.group_size != -1 else inputs
            groups = (torch.arange(inputs, dtype=torch.int32) // size).repeat(num_experts, 1)
            layers.keep(layer, f"{part}_g_idx", groups)
            getattr(layer, f"{part}_g_idx").weight_loader = self._checked(layer, self._load_g_idx(layer))

    def _load_g_idx(self, layer):
        """The weight loader of g_idx, which vLLM has not."""
        loaded = set()

        def load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
            expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if expert < 0:
                return False
            groups = loaded_weight.to(param.dtype)
            if not self.quant_config.act_order:
                size = self.quant_config.group_size if self.quant_config.group_size != -1 else len(groups)
                if len(groups) % param.shape[1]:  # all inputs', of which a shard has a part
                    raise RuntimeError("g_idx does not fill its place")
                if not torch.equal(groups, torch.arange(len(groups), dtype=groups.dtype) // size):
                    raise CheckpointError(
                        f"{self.prefix}.{expert_id} (GPTQ): g_idx is not in order, and the configuration says desc_act "
                        "false"
                    )
                return True
            if groups.shape != param.shape[1:]:
                raise RuntimeError("g_idx does not fill its place")
            if (expert, shard_id == "w2") in loaded and not torch.equal(param.data[expert], groups):
                raise CheckpointError(f"{self.prefix}.{expert_id} (GPTQ): gate and up have different g_idx")
            param.data[expert] = groups
            loaded.add((expert, shard_id == "w2"))
            return True

        return load

    def process_weights_after_loading(self, layer) -> None:
        bits = self.quant_config.quant_type.size_bits
        for part in PARTS:
            names = tuple(f"{part}_{name}" for name in ("qweight", "scales", "qzeros", "g_idx"))
            needed = True, True, not self.quant_config.is_sym, self.quant_config.act_order
            self._check_complete(layer, compress(names, needed))
            weight, scales, qzeros, groups = (getattr(layer, name).data for name in names)

            def one(expert, weight=weight, scales=scales, qzeros=qzeros, groups=groups, part=part):
                zeros, g_idx = None, groups[expert] if self.quant_config.act_order else None
                if not self.quant_config.is_sym:
                    shape = scales[expert].shape
                    zeros = formats.packed_zeros(qzeros[expert], bits, *shape, self.quant_config.plus_one)
                name, kind, layout = f"{self.prefix}.{expert}.{part}", f"GPTQ int{bits}", f"gptq_int{bits}"
                target, given = layers.target(weight, bits), (weight[expert], scales[expert], zeros, g_idx)
                return formats.prepare(name, kind, layout, *given, target, sort=False)

            self._put(layer, part, map(one, range(layer.local_num_experts)), names)
        progress.done(self.prefix)


class AWQExperts(Experts, AutoAWQMoEMethod):
    """AWQ int4."""

    kind = "AWQ int4"

    def __init__(self, quant_config, moe, prefix: str) -> None:
        super().__init__(moe, prefix)
        self.quant_config, self.input_dtype = quant_config, None

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra):
        check_groups(self.prefix, "AWQ", self.quant_config.group_size, hidden_size, intermediate_size_per_partition)
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        super().create_weights(layer, *sizes, params_dtype=torch.float32, **extra)

    def process_weights_after_loading(self, layer) -> None:
        for part in PARTS:
            names = tuple(f"{part}_{name}" for name in ("qweight", "scales", "qzeros"))
            self._check_complete(layer, names if self.quant_config.zero_point else names[:2])
            weight, scales, qzeros = (getattr(layer, name).data for name in names)

            def one(expert, weight=weight, scales=scales, qzeros=qzeros, part=part):
                shape, name = scales[expert].shape, f"{self.prefix}.{expert}.{part}"
                zeros = formats.awq_zeros(qzeros[expert], *shape) if self.quant_config.zero_point else None
                target, kind = layers.target(weight, 4), "AWQ int4"
                return formats.prepare(name, kind, "awq_int4", weight[expert], scales[expert], zeros, target=target)

            self._put(layer, part, map(one, range(layer.local_num_experts)), names)
        progress.done(self.prefix)


class PackedExperts(Experts, CompressedTensorsWNA16MoEMethod):
    """compressed-tensors, 4 or 8 bits in words of 32."""

    kind = "packed"

    def __init__(self, weights, moe, prefix: str) -> None:
        super().__init__(moe, prefix)
        self.weight_quant, self.input_quant, self.is_transposed = weights, None, False
        self.symmetric, self.num_bits, self.strategy = weights.symmetric, weights.num_bits, weights.strategy
        self.packed_factor = Fraction(32, weights.num_bits)
        self.group_size = -1 if weights.group_size is None else weights.group_size

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra):
        check_groups(self.prefix, "packed", self.group_size, hidden_size, intermediate_size_per_partition)
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        super().create_weights(layer, *sizes, params_dtype=torch.float32, **extra)

    def process_weights_after_loading(self, layer) -> None:
        bits = self.num_bits
        for part in PARTS:
            names = tuple(f"{part}_weight_{name}" for name in ("packed", "scale", "zero_point", "shape"))
            self._check_complete(layer, names[: 2 if self.symmetric else 3])
            weight, scales, words = (getattr(layer, name, None) for name in names[:3])

            def one(expert, weight=weight, scales=scales, words=words, part=part):
                scale, zeros = scales.data[expert].T, None
                if not self.symmetric:
                    zeros = formats.packed_zeros(words.data[expert].T.contiguous(), bits, *scale.shape)
                name, target = f"{self.prefix}.{expert}.{part}", layers.target(weight, bits)
                layout, kind = f"int{bits}_rows_i32", f"int{bits}, packed"
                return formats.prepare(name, kind, layout, weight.data[expert], scale, zeros, target=target)

            self._put(layer, part, map(one, range(layer.local_num_experts)), names)
        progress.done(self.prefix)


class Int8Product:
    """Products of experts with int8 weights and activations."""

    libraries = ("int8_gemm", "prologues", "route", "weighted_sum")
    int8 = True

    def _put(self, layer, part, linears, drop) -> None:
        super()._put(layer, part, (linear.of_integers() for linear in linears), drop)


class Int8Experts(Int8Product, Experts, CompressedTensorsW8A8Int8MoEMethod):
    """compressed-tensors W8A8: a scale per output or per projection, activations quantised per token in the kernel, or
    by the checkpoint's scale (and zero) of each expert."""

    kind = "int8"

    def __init__(self, weights, inputs, moe, prefix: str) -> None:
        super().__init__(moe, prefix)
        self.per_tensor, self.static = weights.strategy == "tensor", not inputs.dynamic
        self.symmetric_inputs = inputs.symmetric
        # vLLM makes the parameters of a scale per output and dynamic activations; `create_weights` changes them.
        self.weight_quant = weights.model_copy(update={"strategy": "channel"})
        self.input_quant, self.static_input_scales = inputs, False

    def create_weights(self, layer, num_experts, *sizes, **extra) -> None:
        super().create_weights(layer, num_experts, *sizes, **extra)
        for name in (*(("weight_scale",) if self.per_tensor else ()), *self._of_x()):
            for part, projections in (("w13", 2), ("w2", 1)):
                layer.__dict__.pop(f"{part}_{name}", None)  # vLLM's None
                layers.keep(layer, f"{part}_{name}", torch.zeros(num_experts, projections))
                getattr(layer, f"{part}_{name}").weight_loader = self._checked(layer, self._load_one(layer))

    def _of_x(self) -> tuple[str, ...]:
        """What the checkpoint holds of activations."""
        return ("input_scale", "input_zero_point")[: 2 - self.symmetric_inputs] if self.static else ()

    def _load_one(self, layer):
        """The weight loader of a parameter that has one value of each projection of an expert."""

        def load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
            expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if expert >= 0:
                param.data[expert, int(shard_id == "w3")] = loaded_weight.reshape(())
            return expert >= 0

        return load

    def process_weights_after_loading(self, layer) -> None:
        for part in PARTS:
            names = (f"{part}_weight", f"{part}_weight_scale")
            self._check_complete(layer, (*names, *(f"{part}_{name}" for name in self._of_x())))
            weight, scales = (getattr(layer, name).data for name in names)

            def one(expert, weight=weight, scales=scales, part=part):
                n, k = weight.shape[1:]
                name, scale = f"{self.prefix}.{expert}.{part}", scales[expert].reshape(1, -1)
                scale = scale.repeat_interleave(n // scale.shape[1], 1)  # of a projection, to each of its outputs
                target = layers.target(weight, 8)
                return formats.prepare(name, "int8", "int8_rows", weight[expert], scale, target=target, inputs=k)

            self._put(layer, part, map(one, range(layer.local_num_experts)), names)
            if self.static:
                self._put_known(layer, part)
        progress.done(self.prefix)

    def _put_known(self, layer, part: str) -> None:
        """Scale (and zero) of each expert's activations; of gate and up, the union of their ranges."""
        scales, zeros = (layer._parameters.pop(f"{part}_input_{name}", None) for name in ("scale", "zero_point"))
        if layers.are_random(scales):
            scales = scales.abs().clamp(min=1e-3)
        found = []
        for expert in range(layer.local_num_experts):
            own = None if zeros is None else zeros[expert]
            found.append(formats.static_range(f"{self.prefix}.{expert}.{part}", self.kind, scales[expert], own))
        for name, values in zip(OF_X, zip(*found, strict=True), strict=True):
            stacked = None if values[0] is None else torch.stack(values).view(-1, 1, 1)
            layers.keep(layer, f"gcu_{part}_x_{name}", stacked)


def check_groups(prefix: str, kind: str, size: int, hidden: int, intermediate: int) -> None:
    """Raise where a group would reach over the end of a shard's inputs."""
    for what, inputs in (("hidden", hidden), ("intermediate", intermediate)):
        if size != -1 and inputs % size:
            raise CheckpointError(
                f"{prefix} ({kind} experts): groups of {size} do not divide {inputs} {what} inputs of this shard; "
                "fewer shards or expert parallelism avoid it"
            )
