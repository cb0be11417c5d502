"""One layer of W8A8 experts, expert by expert and token by token, by the meanings of its parts."""

from types import SimpleNamespace

import pytest
import torch

from gcu_compile.kernels.dequant_gemm import eager, layouts
from gcu_compile.kernels.prologues import eager as prologues

pytestmark = pytest.mark.vllm
EXPERTS, TOP, HIDDEN, INNER = 4, 2, 64, 96


def layer_of(activation, x_scales=False, x_zeros=False, zeros=False, **more):
    g, form = torch.Generator().manual_seed(0), layouts.get("host_int8")
    layer = SimpleNamespace(
        expert_map=None, local_num_experts=EXPERTS, apply_router_weight_on_input=False, activation=activation
    )
    for part, (n, k) in {"w13": (2 * INNER, HIDDEN), "w2": (HIDDEN, INNER)}.items():
        codes = torch.randint(-128, 128, (EXPERTS, n, k), generator=g)
        setattr(layer, f"gcu_{part}_weight", torch.stack([layouts.pack(one, form) for one in codes]))
        setattr(layer, f"gcu_{part}_scales", (torch.rand(EXPERTS, 1, n, generator=g) + 0.5) / 74 / k**0.5)
        setattr(layer, f"gcu_{part}_layout", "host_int8")
        if x_scales:
            setattr(layer, f"gcu_{part}_x_scales", torch.rand(EXPERTS, 1, 1, generator=g) / 40 + 0.01)
        for name, asked, size in (("x_zeros", x_zeros, 1), ("zeros", zeros, n)):
            if asked:
                made = torch.randint(-60, 60, (EXPERTS, 1, size), generator=g, dtype=torch.int32)
                setattr(layer, f"gcu_{part}_{name}", made)
    layer.__dict__.update(more)
    return layer


def meaning(layer, x, weights, ids, activate, symmetric=True):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            if layer.expert_map is not None:
                expert = layer.expert_map[expert]
            if expert < 0:
                continue

            def own(part, name, expert=expert):
                found = getattr(layer, f"gcu_{part}_{name}", None)
                return None if found is None else found[expert]

            def product(part, row, scale=None, zero=None, own=own):
                if scale is None:
                    scale, zero = own(part, "x_scales"), own(part, "x_zeros")
                if scale is None and not symmetric:
                    row, scale, zero = eager.quantize(row, 0, False)
                tensors = own(part, "weight"), own(part, "scales"), scale, zero, own(part, "zeros")
                return eager.int8_gemm(row, *tensors, layout="host_int8", out_dtype=torch.float32)

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
@pytest.mark.parametrize(
    ("symmetric", "inputs"),
    [
        (True, {}),
        (True, {"zeros": True}),
        (False, {"zeros": True}),
        (True, {"x_scales": True}),
        (False, {"x_scales": True, "x_zeros": True, "zeros": True}),
    ],
    ids=["dynamic", "zeros of weights", "asymmetric", "static", "static, with zeros"],
)
def test_a_layer_means_its_parts(activation, more, symmetric, inputs):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from vllm_integration.quantization.experts import Experts, Int8Product

    class Method(Int8Product, Experts):
        def __init__(self):
            self.moe, self.symmetric_inputs = SimpleNamespace(has_bias=False), symmetric

        def create_weights(self, *args, **more):
            """Abstract in vLLM; the layer has its weights."""

    def gated(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        made = getattr(torch.nn.functional, activation.lower())(gate) * up
        return eager.quantize(made)[:2] if symmetric and not inputs.get("x_scales") else (made,)

    layer = layer_of(MoEActivation[activation], **inputs, **more)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(33, HIDDEN, generator=g)
    weights, ids = torch.rand(33, EXPERTS, generator=g).topk(TOP)
    one_pass = activation == "SILU" and symmetric and "x_scales" not in inputs
    meant = meaning(layer, x, weights, ids, prologues.silu_mul_quant if one_pass else gated, symmetric)
    y = Method().apply(layer, x, weights, ids.int(), None, None)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), meant, rtol=0, atol=1e-6 * meant.abs().max().item())
