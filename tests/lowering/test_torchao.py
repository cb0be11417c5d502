"""What torchao makes of a model, and transformers through it: every linear layer becomes one operation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import LLAMA

from gcu_compile.kernels.tolerance import tolerance

# Configuration in `torchao_worker.py` -> the operation that a linear layer becomes.
CONFIGS = {
    "int8 weights": "dequant_gemm",
    "int8 weights and activations": "int8_gemm",
    "int4 weights in groups": "dequant_gemm",
    "int8 weights per output": "dequant_gemm",
    "int4 weights, int8 activations": "dequant_gemm",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place, out = Path(sys.prefix) / "torchao", tmp_path_factory.mktemp("torchao") / "out.json"
    assert place.is_dir(), f"torchao is not in {place}: `make test` installs it there"
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, str(Path(__file__).parent / "torchao_worker.py"), str(out)]
    run = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_linear_layers_are_fused(name, dtype, found):
    report = found[f"{name}, {dtype}"]
    assert report["fused"].get(CONFIGS[name]) == 2, report["fused"]
    assert not [other for other in report["operations"] if other.endswith("mm.default") and "gcu" not in other]
    assert report["error"] <= 2 * tolerance(dtype, 256)["atol"]  # two layers


@pytest.mark.parametrize("name", ["int8 weights", "int8 weights and activations", "int4 weights in groups"])
def test_a_model_of_transformers(name, found):
    report = found[f"{name}, llama"]
    assert report["fused"].get(CONFIGS[name]) == 7 * LLAMA["num_hidden_layers"], report["fused"]
    assert report["graph_breaks"] == {}
