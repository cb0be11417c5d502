"""Tiny quantised checkpoints, by hand from each format's definition: round-to-nearest codes of a float checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gcu_compile.kernels.dequant_gemm import eager, layouts

LINEAR = re.compile(r"(proj|proj_with_mqa|c_attn|\.w[123])\.weight$")
Reach = tuple[float, float]  # smallest and largest activation of a layer


@dataclass(frozen=True)
class Form:
    """How a checkpoint stores its linear layers.

    Attributes:
        method: gptq, awq, or compressed (compressed-tensors).
        group: inputs per scale; None: a scale per output; 0: one for the weight.
        order: of GPTQ's inputs: "" as they are, "act" in groups of any inputs, "static" with groups of neighbours.
        activations: "" float, "dynamic" int8 per token, "static" int8 by a scale of the checkpoint.
    """

    method: str
    bits: int = 4
    group: int | None = 64
    symmetric: bool = True
    order: str = ""
    v2: bool = False
    activations: str = ""
    inputs_symmetric: bool = True

    def config(self) -> dict:
        """`quantization_config`."""
        size = -1 if self.group is None else self.group
        if self.method == "gptq":
            form = {"quant_method": "gptq", "bits": self.bits, "group_size": size, "sym": self.symmetric}
            form |= {"desc_act": bool(self.order), "static_groups": self.order == "static"}
            return {**form, "checkpoint_format": "gptq_v2" if self.v2 else "gptq"}
        if self.method == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
        strategy = {None: "channel", 0: "tensor"}.get(self.group, "group")
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": strategy}
        weights |= {"group_size": self.group} if self.group else {}
        inputs = None
        if self.activations:
            inputs = {"num_bits": 8, "type": "int", "symmetric": self.inputs_symmetric}
            inputs["dynamic"] = self.activations == "dynamic"
            inputs["strategy"] = "token" if inputs["dynamic"] else "tensor"
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized" if self.activations else "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
            "ignore": ["lm_head", "re:.*gate$"],
        }

    def store(self, base: str, weight: torch.Tensor, reach: Reach) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(tensors of the checkpoint, the weight [N, K] that they stand for)."""
        n, k = weight.shape
        groups = k // self.group if self.group else 1
        g_idx = torch.arange(k) // (k // groups)
        if self.order == "act":  # one order for all layers of the same inputs, as a shared Hessian gives
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        codes, scales, zeros = codes_of(weight, self, groups, g_idx)
        numbers = ((codes.T - zeros[g_idx]) * scales.float()[g_idx]).T.contiguous()
        rows = layouts.get(f"int{self.bits}_rows_i32")
        if self.method == "gptq":
            tensors = {
                "qweight": layouts.pack(codes, layouts.get(f"gptq_int{self.bits}")),
                "qzeros": layouts.pack(zeros if self.v2 else (zeros - 1) % (1 << self.bits), rows),
                "scales": scales,
                "g_idx": g_idx.to(torch.int32),
            }
        elif self.method == "awq":
            form = layouts.get("awq_int4")
            # Zeros lie in words along N, as the weight does.
            tensors = {"qweight": layouts.pack(codes, form), "scales": scales, "qzeros": layouts.pack(zeros.T, form)}
        elif not self.activations:
            tensors = {"weight_packed": layouts.pack(codes, rows), "weight_scale": scales.T.contiguous()}
            tensors["weight_shape"] = torch.tensor([n, k])
            if not self.symmetric:
                tensors["weight_zero_point"] = layouts.pack(zeros, rows).T.contiguous()
        else:
            tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales.T.contiguous()}
            if self.group == 0:
                tensors["weight_scale"] = scales[0, :1].clone()
            if self.activations == "static":
                scale, zero = self.static(reach)
                tensors["input_scale"] = scale
                tensors |= {} if zero is None else {"input_zero_point": zero.to(torch.int8)}
        return {f"{base}.{name}": tensor for name, tensor in tensors.items()}, numbers

    def static(self, reach: Reach) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero of activations that reach so far."""
        low, high = min(reach[0], 0.0), max(reach[1], 0.0)
        if self.inputs_symmetric:
            return torch.tensor([max(high, -low) / 127]), None
        scale = torch.tensor([(high - low) / 255])
        return scale, torch.round(-128 - low / scale).to(torch.int32)

    def inputs(self, x: torch.Tensor, reach: Reach) -> torch.Tensor:
        """The activations that a layer of this form multiplies."""
        if not self.activations:
            return x
        if self.activations == "static":
            scale, zero = self.static(reach)
            codes = eager.quantize_static(x, scale, zero).float()
            return (codes - (0 if zero is None else zero)) * scale
        codes, scale, zero = eager.quantize(x, 0, self.inputs_symmetric)
        return (codes.float() - zero) * scale


FORMS = {
    "gptq int4": Form("gptq"),
    "gptq int4 v2 asymmetric": Form("gptq", symmetric=False, v2=True),
    "gptq int4 asymmetric act-order": Form("gptq", symmetric=False, order="act"),
    "gptq int4 static groups": Form("gptq", order="static"),
    "gptq int4 per output": Form("gptq", group=None),
    "gptq int8": Form("gptq", bits=8),
    "gptq int8 v2 asymmetric act-order": Form("gptq", bits=8, symmetric=False, v2=True, order="act"),
    "awq int4": Form("awq", symmetric=False),
    "w4a16": Form("compressed"),
    "w4a16 asymmetric": Form("compressed", symmetric=False),
    "w4a16 per output": Form("compressed", group=None),
    "w8a16": Form("compressed", bits=8, group=None),
    "w8a16 groups, asymmetric": Form("compressed", bits=8, group=32, symmetric=False),
    "w8a8": Form("compressed", bits=8, group=None, activations="dynamic"),
    "w8a8 asymmetric": Form("compressed", bits=8, group=None, activations="dynamic", inputs_symmetric=False),
    "w8a8 static": Form("compressed", bits=8, group=None, activations="static"),
    "w8a8 static asymmetric": Form("compressed", bits=8, group=None, activations="static", inputs_symmetric=False),
    "w8a8 static per tensor": Form("compressed", bits=8, group=0, activations="static"),
}


def codes_of(weight: torch.Tensor, form: Form, groups: int, g_idx: torch.Tensor):
    """(codes [N, K], scales [G, N] float16, zeros [G, N]) of a weight [N, K], unsigned."""
    n, k = weight.shape
    low, high = torch.full((groups, n), torch.inf), torch.full((groups, n), -torch.inf)
    low = low.scatter_reduce(0, g_idx.unsqueeze(1).expand(k, n), weight.T, "amin").clamp(max=0)
    high = high.scatter_reduce(0, g_idx.unsqueeze(1).expand(k, n), weight.T, "amax").clamp(min=0)
    if form.group == 0:
        low, high = low.amin().expand(groups, n), high.amax().expand(groups, n)
    top = (1 << form.bits) - 1
    if form.symmetric:
        scales = (2 * torch.maximum(high, -low) / top).half()
        zeros = torch.full((groups, n), 1 << (form.bits - 1))
    else:
        scales = ((high - low) / top).half()
        zeros = torch.round(-low / scales.float()).clamp(0, top).long()
    codes = torch.round(weight.T / scales.float()[g_idx]) + zeros[g_idx]
    return codes.clamp(0, top).long().T, scales, zeros


def save(form: Form, plain: Path, folder: Path, reach: dict[str, Reach] | None = None) -> Path:
    """Write `plain`'s checkpoint in `form` as `folder`, and what it stands for back into `plain`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, packed = load_file(plain / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if not LINEAR.search(name):
            packed[name] = weight
            continue
        base = name.removesuffix(".weight")
        stored, tensors[name] = form.store(base, weight.float(), (reach or {}).get(base, (-8.0, 8.0)))
        packed |= stored
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    for file in plain.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form.config()}))
    return folder


@contextmanager
def quantised_inputs(form: Form, unlike: tuple[int | tuple[int, int], ...]) -> Iterator[None]:
    """Within, every linear of transformers quantises its inputs as `form` says; those with an `unlike` number of
    outputs (heads, routers), or an `unlike` shape of weight, do not."""
    original = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        as_it_is = weight.shape[0] in unlike or tuple(weight.shape) in unlike
        return original(x if as_it_is else form.inputs(x, (-8.0, 8.0)), weight, bias)

    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = original


def load(folder: Path):
    """transformers' model of an unquantised checkpoint, in float32; experts one by one, by `linear`."""
    from transformers import AutoModelForCausalLM

    mixture = "experts" in (folder / "config.json").read_text()
    settings = {"experts_implementation": "eager"} if mixture else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def logprobs(model, prompts: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of each prompt's own tokens, from the second on."""
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            each = model(ids).logits[0, :-1].log_softmax(-1)
            found.append(each.gather(1, ids[0, 1:, None]).flatten().tolist())
    return found


def greedy(model, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers generates."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        new = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        out.append(new[0, len(prompt) :].tolist())
    return out
