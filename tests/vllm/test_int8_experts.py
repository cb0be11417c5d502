"""One layer of W8A8 experts, expert by expert and token by token, by the meanings of its parts."""

from types import SimpleNamespace

import pytest
import torch

from gcu_compile.kernels.dequant_gemm import eager, layouts
from gcu_compile.kernels.prologues import eager as prologues

pytestmark = pytest.mark.vllm
EXPERTS, TOP, HIDDEN, INNER = 4, 2, 64, 96


def layer_of(activation, **more):
    g, form = torch.Generator().manual_seed(0), layouts.get("host_int8")
    layer = SimpleNamespace(
        expert_map=None, local_num_experts=EXPERTS, apply_router_weight_on_input=False, activation=activation
    )
    for part, (n, k) in {"w13": (2 * INNER, HIDDEN), "w2": (HIDDEN, INNER)}.items():
        codes = torch.randint(-128, 128, (EXPERTS, n, k), generator=g)
        setattr(layer, f"gcu_{part}_weight", torch.stack([layouts.pack(one, form) for one in codes]))
        setattr(layer, f"gcu_{part}_scales", (torch.rand(EXPERTS, 1, n, generator=g) + 0.5) / 74 / k**0.5)
        setattr(layer, f"gcu_{part}_layout", "host_int8")
    layer.__dict__.update(more)
    return layer


def meaning(layer, x, weights, ids, activate):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            if layer.expert_map is not None:
                expert = layer.expert_map[expert]
            if expert < 0:
                continue

            def product(part, row, scale=None, expert=expert):
                tensors = (getattr(layer, f"gcu_{part}_{name}")[expert] for name in ("weight", "scales"))
                return eager.int8_gemm(row, *tensors, scale, layout="host_int8", out_dtype=torch.float32)

            row = x[token : token + 1]
            if layer.apply_router_weight_on_input:
                row, weight = row * weight, 1
            y[token] += weight * product("w2", *activate(product("w13", row)))[0].double()
    return y


@pytest.mark.parametrize(
    "more",
    [{}, {"apply_router_weight_on_input": True}, {"expert_map": torch.tensor([2, -1, 0, 3])}],
    ids=["plain", "weights on the input", "experts elsewhere"],
)
@pytest.mark.parametrize("activation", ["SILU", "GELU"])
def test_a_layer_means_its_parts(activation, more):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from vllm_integration.quantization.experts import Experts, Int8Product

    class Method(Int8Product, Experts):
        def __init__(self):
            self.moe = SimpleNamespace(has_bias=False)

        def create_weights(self, *args, **more):
            """Abstract in vLLM; the layer has its weights."""

    def gelu(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        codes, scales, _ = eager.quantize(torch.nn.functional.gelu(gate) * up)
        return codes, scales

    layer = layer_of(MoEActivation[activation], **more)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(33, HIDDEN, generator=g)
    weights, ids = torch.rand(33, EXPERTS, generator=g).topk(TOP)
    meant = meaning(layer, x, weights, ids, prologues.silu_mul_quant if activation == "SILU" else gelu)
    y = Method().apply(layer, x, weights, ids.int(), None, None)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), meant, rtol=0, atol=1e-6 * meant.abs().max().item())
