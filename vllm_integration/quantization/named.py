"""The vendor's names as `quantization=`: w4a16, w8a16, w8a8, and w4a16c8, w8a16c8, w8a8c8 with an int8 KV cache.

A checkpoint that is quantised must be of that kind (GPTQ, AWQ or compressed-tensors; else an error says what it is).
Any other is rounded to nearest as it loads, layer by layer; heads and embeddings stay as they are. c8 sets the KV
cache's dtype to int8 unless the user named one.
"""

from __future__ import annotations

import re

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from gcu_compile.errors import CheckpointError
from gcu_compile.kernels.dequant_gemm import formats
from gcu_compile.quantize import rounding
from gcu_compile.quantize.source import ROUTERS
from vllm_integration.quantization import experts, progress
from vllm_integration.quantization import layer as layers
from vllm_integration.quantization.cache import SUFFIX

KIND = "float, rounded at load"


class NamedConfig(QuantizationConfig):
    """Of a model that is rounded while it loads. Subclasses, one a name, say how."""

    name = ""
    form: rounding.Format

    def get_name(self) -> str:
        return self.name

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return layers.ACTIVATIONS

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None) -> str | None:
        if user_quant != cls.name:
            return None
        found = kind(hf_quant_cfg)
        if found != cls.name.removesuffix(SUFFIX):
            raise CheckpointError(
                f"quantization={cls.name!r}, and the checkpoint is {found}. Leave `quantization` out: it is then taken "
                "from the checkpoint; --kv-cache-dtype int8 gives the cache of c8"
            )
        return cls.name

    @classmethod
    def from_config(cls, config: dict) -> QuantizationConfig:
        """That of the checkpoint's own method."""
        return get_quantization_config(config["quant_method"]).from_config(config)

    def get_quant_method(self, layer, prefix):
        if isinstance(layer, LinearBase) and is_router(prefix):
            return UnquantizedLinearMethod()
        if isinstance(layer, LinearBase):
            method = RoundedLinearMethod()
        elif isinstance(layer, RoutedExperts):
            method = (RoundedInt8Experts if self.form.activations else RoundedExperts)(layer.moe_config, prefix)
        else:
            return None
        method.form, method.prefix = self.form, prefix
        return method


def is_router(prefix: str) -> bool:
    """Whether this linear layer chooses experts, or weighs them: it stays as it is, as in `gcu-compile quantize`."""
    return any(re.fullmatch(router.removeprefix("re:"), prefix) for router in ROUTERS)


def kind(config: dict) -> str:
    """A checkpoint's quantisation by the vendor's names, or by its own where those have none for it."""
    method = config.get("quant_method", "unknown")
    if method in ("gptq", "awq"):
        return f"w{config.get('bits', config.get('w_bit'))}a16"
    groups = list(config.get("config_groups", {}).values())
    if method != "compressed-tensors" or not groups:
        return method
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    bits = (weights.get("num_bits"), 16 if inputs is None else inputs.get("num_bits"))
    whole = weights.get("type") == "int" and (inputs is None or inputs.get("type") == "int")
    return f"w{bits[0]}a{bits[1]}" if whole else f"compressed-tensors ({config.get('format')})"


def rounded(form: rounding.Format, name: str, weight: torch.Tensor, inputs: int) -> formats.Linear:
    """A weight [N, K] of a model in the layout of its device; `inputs` is K before sharding, which groups divide."""
    size = form.group_size(inputs, weight.shape[1])
    if form.grouped and size is None:
        sizes = ", ".join(map(str, rounding.GROUP_SIZES))
        raise CheckpointError(f"{name}: no group of {sizes} divides {weight.shape[1]} of {inputs} inputs")
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(f"{name}: the weight holds NaN or infinity")
    codes, scales = rounding.to_nearest(weight, form.bits, size)
    target = layers.target(weight, form.bits)
    return formats.from_codes(name, f"rounded to int{form.bits}", codes, scales.T.contiguous(), target)


class RoundedLinearMethod(LinearMethodBase):
    """A float layer of the checkpoint, rounded when it has been loaded.

    Not a kind of vLLM's method for float layers: who asks for that takes the layer's words for numbers.
    """

    prefix = ""
    form: rounding.Format

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, *args, **extra):
        self.inputs, self.parts = input_size, sum(map(bool, output_partition_sizes))
        extra["weight_loader"] = layers.checked(extra["weight_loader"], self.prefix, KIND)
        sizes = input_size_per_partition, output_partition_sizes, input_size
        UnquantizedLinearMethod.create_weights(self, layer, *sizes, *args, **extra)
        layers.expect("int8_gemm" if self.form.activations else "dequant_gemm")

    def process_weights_after_loading(self, layer) -> None:
        layers.check_complete(layer, ("weight",), self.parts, self.prefix, KIND)
        linear = rounded(self.form, self.prefix, layer.weight.data, self.inputs)
        layers.put(layer, linear.of_integers() if self.form.activations else linear, ("weight",))
        layers.known_activations(layer, None, None)

    def apply(self, layer, x, bias=None):
        if self.form.activations:
            return layers.apply_int8(layer, x, bias, symmetric=True)
        return layers.apply(layer, x, bias)


class RoundedExperts(experts.Experts):
    """Float experts of the checkpoint, rounded when they have been loaded."""

    form: rounding.Format

    kind = KIND

    def create_weights(self, layer, *args, **extra) -> None:
        extra["weight_loader"] = self._checked(layer, extra["weight_loader"])
        UnquantizedFusedMoEMethod.create_weights(self, layer, *args, **extra)
        layers.expect(*self.libraries)

    def process_weights_after_loading(self, layer) -> None:
        for part in experts.PARTS:
            self._check_complete(layer, (f"{part}_weight",))
            weight = getattr(layer, f"{part}_weight").data

            def one(expert, weight=weight, part=part):
                name = f"{self.prefix}.{expert}.{part}"
                return rounded(self.form, name, weight[expert], weight.shape[-1])

            self._put(layer, part, map(one, range(layer.local_num_experts)), (f"{part}_weight",))
        progress.done(self.prefix)


class RoundedInt8Experts(experts.Int8Product, RoundedExperts):
    """The same with int8 activations."""


def _config(name: str, form: rounding.Format) -> type[NamedConfig]:
    """The configuration of a name, an attribute of this module: spawned engines unpickle it from here."""
    made = type(f"{name.upper()}Config", (NamedConfig,), {"name": name, "form": form, "__module__": __name__})
    globals()[made.__name__] = made
    return made


CONFIGS = {
    name + cache: _config(name + cache, form) for name, form in rounding.FORMATS.items() for cache in ("", SUFFIX)
}
