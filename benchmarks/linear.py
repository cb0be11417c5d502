"""Products with an unquantised weight of bfloat16: `gcu::linear` against vLLM's oneDNN kernel, both of packed weights.

    python benchmarks/linear.py [--layers NxK ...] [--rows 1 16 512] [--json FILE]

Weights rotate and peers take turns as in `dequant_gemm.py`. Called as vLLM's layers call them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from dequant_gemm import READ, ROTATED, of, plain_read, turns

from gcu_compile.kernels import direct
from gcu_compile.kernels.host import pages
from gcu_compile.kernels.linear import pack

LAYERS = ("3072x576", "576x1536", "4096x4096")  # SmolLM2's two largest, and one of 8 billion parameters
CALLS = {1: 150, 16: 100, 512: 15}


def measure(n: int, k: int, rows: list[int]) -> list[dict]:
    """Of each number of rows, the medians in milliseconds."""
    from vllm import _custom_ops as ops

    plain = [torch.randn(n, k).bfloat16() for _ in range(-(-ROTATED // (2 * n * k)))]
    ours = [pages.huge(pack(weight)) for weight in plain]
    theirs = [ops.create_onednn_mm(pages.huge(weight).t(), 32) for weight in plain]
    results = []
    for m in rows:
        x = torch.randn(m, k).bfloat16()
        torch.testing.assert_close(direct.linear(x, ours[0], n), ops.onednn_mm(theirs[0], x, None), rtol=2e-2, atol=0.5)
        peers = {
            "ours": of(ours, lambda w, x=x: direct.linear(x, w, n)),
            "oneDNN": of(theirs, lambda w, x=x: ops.onednn_mm(w, x, None)),
            "read": plain_read(),
        }
        found = turns(peers, CALLS.get(m, 40))
        share = (2 * n * k / found["ours"]) / (READ / found["read"])
        results.append({"n": n, "k": k, "rows": m, **found, "share_of_read": share})
        of_read = f"{share:.2f} of {READ / found['read'] / 1e6:.0f} GB/s" if m == 1 else ""
        both = f"{found['ours']:.3f} | {found['oneDNN']:.3f} | {found['oneDNN'] / found['ours']:.2f}"
        print(f"| {n} x {k} | {m} | {both} | {of_read} |", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 512])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.cpu._init_amx()  # oneDNN's kernels want it, where the CPU has it
    print("| outputs x inputs | rows | ours, ms | oneDNN, ms | ratio | of a plain read |\n|---|--:|--:|--:|--:|---|")
    results = []
    for layer in arguments.layers:
        results += measure(*map(int, layer.split("x")), arguments.rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
