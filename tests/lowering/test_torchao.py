"""What torchao makes of a model, and transformers through it: every linear layer becomes one operation."""

import pytest
import torch
from tiny import LLAMA, save_llama

import gcu_compile
from gcu_compile.kernels.tolerance import tolerance

torchao = pytest.importorskip("torchao")
from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup  # noqa: E402

# Configuration -> the operation that a linear layer becomes.
CONFIGS = {
    "int8 weights": (Int8WeightOnlyConfig, {}, "dequant_gemm"),
    "int8 weights and activations": (Int8DynamicActivationInt8WeightConfig, {}, "int8_gemm"),
    "int4 weights in groups": (
        IntxWeightOnlyConfig,
        {"weight_dtype": torch.int4, "granularity": PerGroup(64)},
        "dequant_gemm",
    ),
    "int8 weights per output": (
        IntxWeightOnlyConfig,
        {"weight_dtype": torch.int8, "granularity": PerAxis(0)},
        "dequant_gemm",
    ),
    "int4 weights, int8 activations": (
        Int8DynamicActivationIntxWeightConfig,
        {"weight_dtype": torch.int4, "weight_granularity": PerGroup(64)},
        "dequant_gemm",
    ),
}


def model(dtype):
    torch.manual_seed(0)
    layers = torch.nn.Linear(256, 192, bias=False), torch.nn.SiLU(), torch.nn.Linear(192, 128)
    return torch.nn.Sequential(*layers).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_linear_layers_are_fused(name, dtype):
    make, settings, op = CONFIGS[name]
    network, x = model(dtype), torch.randn(2, 5, 256).to(dtype)
    quantize_(network, make(**settings))
    report = gcu_compile.explain(network, x).to_json()
    assert report["fused"].get(op) == 2, report["fused"]
    assert not [other for other in report["operations"] if other.endswith("mm.default") and "gcu" not in other]
    assert report["error"] <= 2 * tolerance(dtype, 256)["atol"]  # two layers


@pytest.mark.parametrize("name", ["int8 weights", "int8 weights and activations", "int4 weights in groups"])
@torch.no_grad()
def test_a_model_of_transformers(name, tmp_path):
    from transformers import AutoModelForCausalLM, TorchAoConfig

    make, settings, op = CONFIGS[name]
    folder = save_llama(tmp_path / "llama")
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=TorchAoConfig(make(**settings))
    ).eval()
    ids = torch.arange(3, 12).unsqueeze(0)
    report = gcu_compile.explain(lambda x: network(x, use_cache=False).logits, ids).to_json()
    assert report["fused"].get(op) == 7 * LLAMA["num_hidden_layers"], report["fused"]
    assert report["graph_breaks"] == {}
