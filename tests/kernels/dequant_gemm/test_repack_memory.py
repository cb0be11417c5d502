"""Repacking a model needs little more memory than one layer's copy: measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

N, K, LAYERS = 6144, 8192, 3

SCRIPT = """
import json, re, sys, torch
from gcu_compile.kernels.dequant_gemm import formats, layouts

torch.set_num_threads(2)
bits, layout, n, k, count, order = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]), sys.argv[6]

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def stored(n, k):
    form = layouts.get(layout)
    return torch.ones(form.shape(n, k), dtype=form.word)

def prepare(weight, n, k):
    g_idx = (torch.arange(k) * 7919 % k * 2 // k).to(torch.int32) if order == "act" else None
    return formats.prepare("layer", "format", layout, weight, torch.ones(2, n), None, g_idx, f"host_int{bits}")

prepare(stored(256, 64), 256, 64)
layers = [stored(n, k) for _ in range(count)]
before = status("VmRSS")
for index in range(count):
    layers[index] = prepare(layers[index], n, k).weight
print(json.dumps({"before": before, "peak": status("VmHWM"), "after": status("VmRSS"), "layer": layers[0].nbytes}))
"""


@pytest.mark.parametrize(
    ("bits", "layout", "order"),
    [
        (4, "gptq_int4", ""),
        (8, "int8_rows_i32", ""),
        (8, "int8_rows", ""),
        (4, "gptq_int4", "act"),
        (4, "awq_int4", ""),
    ],
)
def test_one_copy_of_a_layer_at_a_time(bits, layout, order):
    words = [sys.executable, "-c", SCRIPT, str(bits), layout, str(N), str(K), str(LAYERS), order]
    # glibc then gives freed memory back at once, so that what is resident is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout)
    one = found["layer"]
    # A layer's copy, and the pieces that two threads have in work; its codes in 32 bits would be 200 MB.
    allowed = one + (32 << 20)
    assert found["peak"] - found["before"] <= allowed, found
    assert found["after"] - found["before"] <= one, found  # what was replaced is gone
