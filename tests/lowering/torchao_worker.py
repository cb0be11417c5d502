"""Quantises models with torchao and compiles them: `python torchao_worker.py OUT.json`. In a process of its own, for
transformers looks for torchao once.

OUT.json: name -> what `explain` says of a model of two linear layers, and of a Llama that transformers loaded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup

import gcu_compile

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny import save_llama

GROUPS, OUTPUTS = PerGroup(64), PerAxis(0)
CONFIGS = {
    "int8 weights": lambda: Int8WeightOnlyConfig(),
    "int8 weights and activations": lambda: Int8DynamicActivationInt8WeightConfig(),
    "int4 weights in groups": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=GROUPS),
    "int8 weights per output": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=OUTPUTS),
    "int4 weights, int8 activations": lambda: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=GROUPS
    ),
}


def layers(name: str, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    linears = torch.nn.Linear(256, 192, bias=False), torch.nn.SiLU(), torch.nn.Linear(192, 128)
    network, x = torch.nn.Sequential(*linears).to(dtype).eval(), torch.randn(2, 5, 256).to(dtype)
    quantize_(network, CONFIGS[name]())
    return gcu_compile.explain(network, x).to_json()


def llama(name: str, folder: Path) -> dict:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    settings = {"dtype": torch.float32, "quantization_config": TorchAoConfig(CONFIGS[name]())}
    network = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    ids = torch.arange(3, 12).unsqueeze(0)
    return gcu_compile.explain(lambda x: network(x, use_cache=False).logits, ids).to_json()


def main(out: str) -> None:
    found = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name in CONFIGS:
            for dtype in (torch.float32, torch.bfloat16):
                found[f"{name}, {dtype}"] = layers(name, dtype)
        model = save_llama(Path(folder) / "llama")
        for name in ("int8 weights", "int8 weights and activations", "int4 weights in groups"):
            found[f"{name}, llama"] = llama(name, model)
    keep = ("fused", "operations", "error", "graph_breaks")
    Path(out).write_text(json.dumps({name: {key: one[key] for key in keep} for name, one in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
