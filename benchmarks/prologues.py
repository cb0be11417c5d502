"""Add + RMSNorm + int8 and SwiGLU + int8, a scale per token, bfloat16, against vLLM's kernels and Inductor.

Ours are called as generated code calls them, past torch's dispatcher (`kernels/direct.py`). vLLM's norm writes over its
inputs, which are lost then: it is timed with the copies that keep them, and without, against ours, on inputs that were
just written.

python benchmarks/prologues.py [--tokens 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

import gcu_compile.kernels.prologues  # noqa: F401
from gcu_compile.kernels import direct
from gcu_compile.kernels.prologues import eager

HIDDEN, WIDE, CALLS = 4096, 11008, 40
WRITTEN = ", inputs just written"


def turns(peers: dict, before=lambda: None) -> dict[str, float]:
    """Median milliseconds of each peer, in turns of random order, for whoever follows a stranger's pass over memory is
    the slower; `before` each call, and not in its time."""
    times, order = {name: [] for name in peers}, list(peers)
    for call in peers.values():
        call()
        call()
    for _ in range(CALLS):
        random.shuffle(order)
        for name in order:
            before()
            start = time.perf_counter()
            peers[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def norm(tokens: int) -> dict:
    from vllm import _custom_ops as ops

    x, residual = (torch.randn(tokens, HIDDEN).bfloat16() for _ in range(2))
    weight, y, kept = torch.rand(HIDDEN).bfloat16(), x.clone(), residual.clone()

    def vllm():  # both are written in place; their values do not matter here, their sizes do
        ops.fused_add_rms_norm(y.copy_(x), kept.copy_(residual), weight, 1e-6)
        return ops.onednn_scaled_int8_quant(y, None, None, True)

    def write_inputs():  # as the layers in front of a norm do
        y.copy_(x)
        kept.copy_(residual)

    def vllm_in_place():
        ops.fused_add_rms_norm(y, kept, weight, 1e-6)
        return ops.onednn_scaled_int8_quant(y, None, None, True)

    inductor = torch.compile(lambda: eager.rms_norm_quant(x, residual, weight, 1e-6))
    peers = {
        "ours": lambda: direct.rms_norm_quant(x, residual, weight, 1e-6),
        "vLLM's pair and the copies that keep its inputs": vllm,
        "Inductor": inductor,
    }
    written = {
        f"ours{WRITTEN}": lambda: direct.rms_norm_quant(y, kept, weight, 1e-6),
        f"vLLM's pair in place{WRITTEN}": vllm_in_place,
    }
    return turns(peers) | turns(written, write_inputs)


def swiglu(tokens: int) -> dict:
    from vllm import _custom_ops as ops

    x, out = torch.randn(tokens, 2 * WIDE).bfloat16(), torch.empty(tokens, WIDE).bfloat16()

    def vllm():
        torch.ops._C.silu_and_mul(out, x)
        return ops.onednn_scaled_int8_quant(out, None, None, True)

    inductor = torch.compile(lambda: eager.silu_mul_quant(x))
    return turns({"ours": lambda: direct.silu_mul_quant(x), "vLLM's pair": vllm, "Inductor": inductor})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.cpu._init_amx()  # vLLM's kernels die without, where the CPU has it
    results = []
    print("| what | tokens | kernel | ms | of ours |\n|---|--:|---|--:|--:|")
    for name, measure in (("add, RMSNorm, int8", norm), ("SwiGLU, int8", swiglu)):
        found = measure(arguments.tokens)
        for kernel, ms in found.items():
            ours = found[f"ours{WRITTEN}" if kernel.endswith(WRITTEN) else "ours"]
            print(f"| {name} | {arguments.tokens} | {kernel} | {ms:.3f} | {ms / ours:.2f} |", flush=True)
            results.append({"what": name, "kernel": kernel, "ms": ms, "ours_ms": ours})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
