"""A mixture of 64 experts, 8 of them for each token: one layer, quantised, against vLLM's in bfloat16.

    python benchmarks/experts.py [--tokens 1 64 512] [--json FILE]

Hidden size 2048, 768 inner values, random routing. Ours is the whole of what vLLM calls after routing: sorting, both
grouped products, the activation, and the weighted sum. vLLM's is the kernel that its stock build chooses on this
machine. The SGLang kernel for int8 that vLLM ships takes its turn as well. Medians are compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from dequant_gemm import optional, turns

import gcu_compile.kernels.dequant_gemm  # noqa: F401
from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.kernels.host import pages

EXPERTS, TOP, HIDDEN, INNER, GROUP = 64, 8, 2048, 768, 128
SHAPES = {"w13": (2 * INNER, HIDDEN), "w2": (HIDDEN, INNER)}
CALLS = {1: 60, 64: 15, 512: 7}


def ours(kind: str):
    """The layer of vLLM as the platform prepares it, and its method."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from vllm_integration.quantization.experts import TENSORS, Experts, Int8Product

    class Method(*((Int8Product,) if kind == "w8a8" else ()), Experts):
        def __init__(self):
            self.moe = SimpleNamespace(has_bias=False)

        def create_weights(self, *args, **more):
            raise NotImplementedError

    layer = SimpleNamespace(
        expert_map=None,
        local_num_experts=EXPERTS,
        apply_router_weight_on_input=False,
        activation=MoEActivation.SILU,
    )
    layout = layouts.get("host_int8" if kind == "w8a8" else "host_int4")
    for part, (n, k) in SHAPES.items():
        groups = 1 if kind == "w8a8" else k // GROUP
        words = torch.randint(-(2**31), 2**31 - 1, (EXPERTS, *layout.shape(n, k)), dtype=torch.int32)
        scales = torch.rand(EXPERTS, groups, n) / 50 / k**0.5
        made = {"weight": pages.huge(words), "scales": scales if kind == "w8a8" else scales.bfloat16()}
        for name in TENSORS:
            setattr(layer, f"gcu_{part}_{name}", made.get(name))
        setattr(layer, f"gcu_{part}_layout", layout.name)
    return Method(), layer


def vllms():
    from vllm import _custom_ops as ops

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    weights = (torch.randn(EXPERTS, *shape).bfloat16() / 50 for shape in SHAPES.values())
    packed = [ops.cpu_prepack_moe_weight(weight, isa) for weight in weights]

    def call(x, weights, ids):
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, *packed, None, None, weights, ids, "silu", isa)
        return out

    return call


def sgls():
    """The SGLang kernel for int8 weights and activations, with scales per output and per token."""
    from vllm import _custom_ops as ops

    packed, scales = [], []
    for n, k in SHAPES.values():
        packed.append(torch.ops._C.convert_weight_packed(torch.randint(-128, 128, (EXPERTS, n, k), dtype=torch.int8)))
        scales.append(torch.rand(EXPERTS, n) / 50 / k**0.5)
    unused = [None] * 7  # zeros, block size, biases, limits

    def call(x, weights, ids):
        out = torch.empty_like(x)
        kind = ops.CPUQuantMethod.INT8_W8A8
        ops.fused_experts_cpu(out, x, *packed, weights, ids, kind, *scales, *unused, True)
        return out

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 64, 512])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sides = {f"ours, {kind}": ours(kind) for kind in ("w4a16", "w8a8")}
    reference, int8, results = vllms(), sgls(), []
    print("| tokens | kernel | ms | faster than vLLM |\n|--:|---|--:|--:|")
    for tokens in arguments.tokens:
        x = torch.randn(tokens, HIDDEN).bfloat16()
        weights, ids = torch.rand(tokens, EXPERTS).softmax(-1).topk(TOP)
        ids = ids.to(torch.int32)

        def peer(method, layer, routed=(x, weights, ids)):
            return lambda _: method.apply(layer, *routed, None, None)

        peers = {name: peer(*side) for name, side in sides.items()}
        peers["vLLM, bf16"] = lambda _, routed=(x, weights, ids): reference(*routed)
        optional(peers, "SGL, int8", lambda routed=(x, weights, ids): lambda _: int8(*routed))
        found = turns(peers, CALLS.get(tokens, 7))
        for name, ms in found.items():
            print(f"| {tokens} | {name} | {ms:.3f} | {found['vLLM, bf16'] / ms:.2f} |", flush=True)
            results.append({"tokens": tokens, "kernel": name, "ms": ms, "vllm_ms": found["vLLM, bf16"]})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
