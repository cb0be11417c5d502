"""Tiny quantised checkpoints: round-to-nearest codes of `tiny.save_llama`'s weights in the files of each format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import save_llama

from gcu_compile.kernels.dequant_gemm import layouts

GROUP = 64


def codes_of(weight, bits, groups, symmetric, g_idx):
    """(codes [N, K], scales [G, N] float16, zeros [G, N]) of a weight [N, K]."""
    n, k = weight.shape
    low, high = torch.full((groups, n), torch.inf), torch.full((groups, n), -torch.inf)
    low = low.scatter_reduce(0, g_idx.unsqueeze(1).expand(k, n), weight.T, "amin").clamp(max=0)
    high = high.scatter_reduce(0, g_idx.unsqueeze(1).expand(k, n), weight.T, "amax").clamp(min=0)
    top = (1 << bits) - 1
    if symmetric:
        scales = (2 * torch.maximum(high, -low) / top).half()
        zeros = torch.full((groups, n), 1 << (bits - 1))
    else:
        scales = ((high - low) / top).half()
        zeros = torch.round(-low / scales.float()).clamp(1, top).long()
    codes = torch.round(weight.T / scales.float()[g_idx]) + zeros[g_idx]
    return codes.clamp(0, top).long().T, scales, zeros


def save_gptq(folder: Path, bits=4, symmetric=True, desc_act=False, v2=False) -> Path:
    """A GPTQ checkpoint in `folder`, and the same weights as numbers in `folder`/plain."""
    plain = save_llama(folder / "plain")
    tensors = load_file(plain / "model.safetensors")
    packed = {}
    for name, weight in list(tensors.items()):
        if not name.endswith("proj.weight"):
            packed[name] = weight
            continue
        n, k = weight.shape
        groups, base = k // GROUP, name.removesuffix(".weight")
        g_idx = torch.arange(k) // GROUP
        if desc_act:  # one order for all layers of the same inputs, as a shared Hessian gives
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        codes, scales, zeros = codes_of(weight, bits, groups, symmetric, g_idx)
        tensors[name] = ((codes.T - zeros[g_idx]) * scales.float()[g_idx]).T.contiguous()
        stored = zeros if v2 else zeros - 1
        form = layouts.get("int4_rows_i32" if bits == 4 else "int8_rows_i32")
        packed |= {
            f"{base}.qweight": layouts.pack(codes, layouts.get(f"gptq_int{bits}")),
            f"{base}.qzeros": layouts.pack(stored, form),
            f"{base}.scales": scales,
            f"{base}.g_idx": g_idx.to(torch.int32),
        }
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": desc_act,
        "sym": symmetric,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_awq(folder: Path) -> Path:
    """An AWQ checkpoint in `folder`, and the same weights as numbers in `folder`/plain."""
    plain = save_llama(folder / "plain")
    tensors = load_file(plain / "model.safetensors")
    packed = {}
    for name, weight in list(tensors.items()):
        if not name.endswith("proj.weight"):
            packed[name] = weight
            continue
        n, k = weight.shape
        g_idx, base = torch.arange(k) // GROUP, name.removesuffix(".weight")
        codes, scales, zeros = codes_of(weight, 4, k // GROUP, False, g_idx)
        tensors[name] = ((codes.T - zeros[g_idx]) * scales.float()[g_idx]).T.contiguous()
        form = layouts.get("awq_int4")
        packed |= {f"{base}.qweight": layouts.pack(codes, form), f"{base}.scales": scales}
        packed[f"{base}.qzeros"] = layouts.pack(zeros.T, form)  # [G, N / 8], packed along N as the weight is
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    method = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    return folder


def greedy(folder: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers generates from an unquantised checkpoint, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        new = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        out.append(new[0, len(prompt) :].tolist())
    return out
