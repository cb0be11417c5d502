"""Quantised products of one layer, N = K = 4096, against every peer that this environment has.

    python benchmarks/dequant_gemm.py [--only w4a16|w8a16|w8a8] [--rows 1 32 512] [--cpu-time] [--json FILE]

Weights rotate over 256 MiB or more, so that no cache holds them. We and the peers take turns in a random order, and the
medians are compared. A turn of up to 32 rows is four calls, each with another weight, as layers follow each other in a
model: a product of a third of a millisecond would else be measured with a way through Python that a stranger's pass
over memory has just put out of the caches. Ours are called as generated code and vLLM's layers call them, past torch's
dispatcher (`kernels/direct.py`). With few rows a plain read of memory takes its turn as well, for a virtual machine's
bandwidth changes from second to second; the last column is the share of it.
`--cpu-time` takes one thread and the time that it was running: for a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

import gcu_compile.kernels.dequant_gemm  # noqa: F401
from gcu_compile.kernels import direct
from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.kernels.host import pages

N = K = 4096
GROUP = 128
ROTATED = 256 << 20
READ = 64 << 20
STREAMED = 8  # up to so many rows a product may run at the speed of memory
CALLS = {1: 60, 8: 40, 32: 32, 512: 9}
SHORT, IN_A_ROW = 32, 4  # up to so many rows a turn is so many calls
clock = time.perf_counter


def plain_read():
    """A read of 64 MiB, rotated like the weights, with all threads."""
    buffer = torch.ones(512 // 64, READ // 8, dtype=torch.int64)
    return lambda i: buffer[i % len(buffer)].sum()


def turns(peers: dict, calls: int, in_a_row: int = 1) -> dict[str, float]:
    """Median milliseconds of each peer, called with the number of the weight to use, in turns of random order of
    `in_a_row` calls.

    Every weight is used once before: a layer's first call looks at its tensors, and a model makes it once.
    """
    times = {name: [] for name in peers}
    for call in peers.values():
        for i in range(calls):
            call(i)
    order = list(peers)
    for first in range(0, calls, in_a_row):
        random.shuffle(order)
        for name in order:
            for i in range(first, first + in_a_row):
                start = clock()
                peers[name](i)
                times[name].append(clock() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def rotated(make) -> list:
    """As many products of `make` as fill 256 MiB; `make` returns (what a call needs, its bytes)."""
    first, size = make()
    return [first, *(make()[0] for _ in range(-(-ROTATED // size) - 1))]


def of(weights: list, call):
    return lambda i: call(weights[i % len(weights)])


def optional(peers: dict, name: str, build) -> None:
    """Add the peer that `build` returns; one that cannot run here is named with the reason."""
    try:
        call = build()
        call(0)
    except (AttributeError, RuntimeError, ImportError, NotImplementedError, AssertionError) as error:
        print(f"  ({name} left out: {str(error).splitlines()[0][:100]})")
        return
    peers[name] = call


def w4a16(x):
    from vllm import _custom_ops as ops

    scales = torch.rand(K // GROUP, N).bfloat16()

    def words(*shape):
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)

    def tiles():
        weight = pages.huge(words(*layouts.get("host_int4").shape(N, K)))  # as every layer that we prepare
        return weight, weight.nbytes

    ours = rotated(tiles)
    peers = {"ours": of(ours, lambda w: direct.dequant_gemm(x, w, scales, layout="host_int4"))}

    def vllm():
        weights = rotated(lambda: (words(N // 16, K * 16 // 8), N * K // 2))
        hint = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        return of(weights, lambda w: ops.cpu_gemm_wna16(x, w, scales, None, None, 8, hint))

    def aten():
        def make():
            codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
            weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            return weight, N * K // 2

        both = torch.rand(K // GROUP, N, 2).bfloat16()
        return of(rotated(make), lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, both))

    optional(peers, "vLLM cpu_gemm_wna16", vllm)
    optional(peers, "aten int4pack", aten)
    optional(peers, "bf16 linear", lambda: bf16(x))
    return peers, N * K // 2 + scales.nbytes


def bf16(x):
    weights = rotated(lambda: (torch.randn(N, K).bfloat16(), 2 * N * K))
    return of(weights, lambda w: torch.nn.functional.linear(x, w))


def int8_weights():
    return rotated(lambda: (torch.randint(-128, 128, (N, K), dtype=torch.int8), N * K))


def w8a16(x):
    scales = torch.rand(1, N).bfloat16()
    plain = int8_weights()
    ours = [pages.huge(layouts.repack(w, layouts.get("int8_rows"), layouts.get("host_int8"), N, K)) for w in plain]
    peers = {"ours": of(ours, lambda w: direct.dequant_gemm(x, w, scales, layout="host_int8"))}
    flat = scales.reshape(-1)
    optional(peers, "aten int8pack", lambda: of(plain, lambda w: torch.ops.aten._weight_int8pack_mm(x, w, flat)))
    optional(peers, "bf16 linear", lambda: bf16(x))
    return peers, N * K


def w8a8(x):
    """Activations in bfloat16, quantised per token inside of every call."""
    from vllm import _custom_ops as ops

    scales = torch.rand(1, N)
    plain = int8_weights()
    ours = [pages.huge(layouts.repack(w, layouts.get("int8_rows"), layouts.get("host_int8"), N, K)) for w in plain]
    peers = {"ours": of(ours, lambda w: direct.int8_gemm(x, w, scales, layout="host_int8"))}

    def onednn():
        handlers = [ops.create_onednn_scaled_mm(w.t(), scales.reshape(N, 1), x.dtype, True, False, 32) for w in plain]
        out = torch.empty(x.shape[0], N, dtype=x.dtype)

        def call(handler):
            codes, x_scales, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
            ops.onednn_scaled_mm(handler, codes, out, x_scales, None, None, None)

        return of(handlers, call)

    def sgl():
        packed = [torch.ops._C.convert_weight_packed(w) for w in plain]
        flat = scales.reshape(-1)
        return of(packed, lambda w: torch.ops._C.int8_scaled_mm_with_quant(x, w, flat, None, x.dtype, True))

    optional(peers, "vLLM onednn_scaled_mm", onednn)
    optional(peers, "SGL int8_scaled_mm_with_quant", sgl)

    def int_mm():
        def call(w):
            codes, x_scales, _ = torch.ops.gcu.quantize_per_token(x)
            return (torch._int_mm(codes, w.t()).float() * x_scales * scales).to(x.dtype)

        return of(plain, call)

    if x.shape[0] > 16:  # what _int_mm takes
        optional(peers, "quantize + torch._int_mm", int_mm)
    return peers, N * K


FORMATS = {"w4a16": w4a16, "w8a16": w8a16, "w8a8": w8a8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=FORMATS, nargs="*", default=list(FORMATS))
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32, 512])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        global clock
        torch.set_num_threads(1)
        clock = time.thread_time
    torch.manual_seed(0)
    random.seed(0)
    torch.cpu._init_amx()  # vLLM's kernels die without, where the CPU has it
    print("| format | M | kernel | ms | of ours | GB/s of weights | T(FL)OP/s | of a plain read |")
    print("|---|--:|---|--:|--:|--:|--:|--:|")
    results, read = [], plain_read()
    for name in arguments.only:
        for rows in arguments.rows:
            x = torch.randn(rows, K).bfloat16()
            peers, size = FORMATS[name](x)
            if rows <= STREAMED:
                peers["read"] = read
            found = turns(peers, CALLS.get(rows, 9), IN_A_ROW if rows <= SHORT else 1)
            speed = READ / found.pop("read") / 1e6 if rows <= STREAMED else None
            for peer, ms in found.items():
                rate, flops = size / ms / 1e6, 2 * rows * N * K / ms / 1e9
                share = f"{rate / speed:.2f} of {speed:.1f} GB/s" if speed and peer == "ours" else ""
                print(
                    f"| {name} | {rows} | {peer} | {ms:.3f} | {ms / found['ours']:.2f} | {rate:.1f} | {flops:.3f} "
                    f"| {share} |",
                    flush=True,
                )
                result = {"format": name, "rows": rows, "kernel": peer, "ms": ms, "ours_ms": found["ours"]}
                results.append({**result, "read_gb_s": speed})
            del peers
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
