"""Experts in one go are, bit for bit, experts operation by operation."""

from types import SimpleNamespace

import pytest
import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.kernels.host import experts as host

pytestmark = pytest.mark.vllm
EXPERTS, TOP, HIDDEN, INNER, GROUP = 6, 3, 96, 64, 32
BITS = {"int4": 4, "int8 weights": 8, "w8a8": 8}


def method_of(kind, symmetric=True):
    from vllm_integration.quantization.experts import Experts, Int8Product

    class Method(*((Int8Product,) if kind == "w8a8" else ()), Experts):
        def __init__(self):
            self.moe, self.symmetric_inputs = SimpleNamespace(has_bias=False), symmetric

        def create_weights(self, *args, **more):
            """Abstract in vLLM; the layer has its weights."""

    return Method()


def layer_of(kind, activation, zeros=False, bias=False, scales_dtype=torch.float32, x_scales=None, x_zeros=False):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    g, bits = torch.Generator().manual_seed(0), BITS[kind]
    form = layouts.get("host_int4" if bits == 4 else "host_int8")
    layer = SimpleNamespace(
        expert_map=None,
        local_num_experts=EXPERTS,
        apply_router_weight_on_input=False,
        activation=MoEActivation[activation],
    )
    for part, (n, k) in {"w13": (2 * INNER, HIDDEN), "w2": (HIDDEN, INNER)}.items():
        groups = 1 if kind == "w8a8" else k // GROUP
        low, high = form.range
        codes = torch.randint(low, high + 1, (EXPERTS, n, k), generator=g)
        setattr(layer, f"gcu_{part}_weight", torch.stack([layouts.pack(one, form) for one in codes]))
        scales = (torch.rand(EXPERTS, groups, n, generator=g) + 0.5) / high / k**0.5
        setattr(layer, f"gcu_{part}_scales", scales.to(scales_dtype))
        if zeros:
            made = torch.randint(low, high + 1, (EXPERTS, groups, n), generator=g)
            setattr(layer, f"gcu_{part}_zeros", made.int() if kind == "w8a8" else made.float())
        if x_scales:
            setattr(layer, f"gcu_{part}_x_scales", torch.rand(x_scales, generator=g) / 40 + 0.01)
        if x_zeros:
            made = torch.randint(-60, 60, x_scales, generator=g, dtype=torch.int32)
            setattr(layer, f"gcu_{part}_x_zeros", made)
        for name in ("zeros", "g_idx"):
            if not hasattr(layer, f"gcu_{part}_{name}"):
                setattr(layer, f"gcu_{part}_{name}", None)
        setattr(layer, f"gcu_{part}_layout", form.name)
        if bias:
            setattr(layer, f"{part}_bias", torch.randn(EXPERTS, n, generator=g))
    layer._loaded_expert_biases = {"w13_bias", "w2_bias"} if bias else set()
    return layer


def routed(tokens, dtype, ids_dtype, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=g).to(dtype)
    weights, ids = torch.rand(tokens, EXPERTS - 1, generator=g).topk(TOP)  # the last expert has no rows
    return x, weights, ids.to(ids_dtype)


def both(method, layer, arguments, monkeypatch):
    """(operation by operation, in one go)"""
    with monkeypatch.context() as patch:
        patch.setattr(host, "run", lambda *args, **kwargs: None)
        expected = method.apply(layer, *arguments, None, None)
    return expected, at_once(method, layer, arguments, monkeypatch)


def at_once(method, layer, arguments, monkeypatch):
    """What the experts in one go give; None: they leave it to the operations."""
    given, run = [], host.run
    with monkeypatch.context() as patch:
        patch.setattr(host, "run", lambda *args, **kwargs: given.append(run(*args, **kwargs)) or given[-1])
        method.apply(layer, *arguments, None, None)
    return given[-1]


@pytest.mark.parametrize("tokens", (1, 5, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("activation", ("SILU", "GELU"))
@pytest.mark.parametrize("kind", BITS)
def test_the_same_numbers(kind, activation, dtype, tokens, monkeypatch):
    method, layer = method_of(kind), layer_of(kind, activation)
    for seed, ids_dtype in enumerate((torch.int32, torch.int64)):
        expected, found = both(method, layer, routed(tokens, dtype, ids_dtype, seed), monkeypatch)
        assert found is not None and found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("more", ({"zeros": True}, {"bias": True}, {"scales_dtype": torch.bfloat16}), ids=str)
def test_zeros_biases_and_scales(more, monkeypatch):
    method, layer = method_of("int4"), layer_of("int4", "SILU", **more)
    expected, found = both(method, layer, routed(7, torch.bfloat16, torch.int32), monkeypatch)
    assert found is not None and torch.equal(found, expected)


def counted(method, layer, arguments, monkeypatch):
    """The kernels that were called in one go, and operation by operation."""
    counts = []
    for whole in (True, False):
        with monkeypatch.context() as patch:
            if not whole:
                patch.setattr(host, "run", lambda *args, **kwargs: None)
            before = registry.calls.copy()
            method.apply(layer, *arguments, None, None)
            counts.append(registry.calls - before)
    return counts


STATIC = {"x_scales": (EXPERTS, 1, 1)}
INPUTS = {
    "dynamic, zeros of weights": (True, {"zeros": True, "bias": True}),
    "asymmetric": (False, {}),
    "asymmetric, zeros of weights": (False, {"zeros": True}),
    "static": (True, STATIC),
    "static, with zeros": (False, {**STATIC, "x_zeros": True, "zeros": True}),
}


@pytest.mark.parametrize("tokens", (1, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("activation", ("SILU", "GELU"))
@pytest.mark.parametrize("inputs", INPUTS)
def test_activations_with_scales_and_zeros_of_every_kind(inputs, activation, dtype, tokens, monkeypatch):
    symmetric, more = INPUTS[inputs]
    method, layer = method_of("w8a8", symmetric), layer_of("w8a8", activation, **more)
    arguments = routed(tokens, dtype, torch.int32)
    expected, found = both(method, layer, arguments, monkeypatch)
    assert found is not None and torch.equal(found, expected)
    counts = counted(method, layer, arguments, monkeypatch)
    assert counts[0] == counts[1] and not any(name == "eager" for _, name in counts[0])


def test_a_scale_of_all_activations_goes_operation_by_operation(monkeypatch):
    method, layer = method_of("w8a8"), layer_of("w8a8", "SILU", x_scales=(1,))
    arguments = routed(5, torch.bfloat16, torch.int32)
    expected, found = both(method, layer, arguments, monkeypatch)
    assert found is None
    for part in ("w13", "w2"):
        of_all = getattr(layer, f"gcu_{part}_x_scales")
        setattr(layer, f"gcu_{part}_x_scales", of_all.view(1, 1, 1).repeat(EXPERTS, 1, 1))
    assert torch.equal(at_once(method, layer, arguments, monkeypatch), expected)


@pytest.mark.parametrize("kind", BITS)
def test_the_same_kernels_are_counted(kind, monkeypatch):
    method, layer = method_of(kind), layer_of(kind, "SILU")
    arguments = routed(5, torch.bfloat16, torch.int32)
    both(method, layer, arguments, monkeypatch)
    counts = counted(method, layer, arguments, monkeypatch)
    assert counts[0] == counts[1]


def test_what_goes_operation_by_operation(monkeypatch):
    method, layer = method_of("int4"), layer_of("int4", "SILU")
    x, weights, ids = routed(5, torch.bfloat16, torch.int32)
    assert at_once(method, layer, (x, weights, ids), monkeypatch) is None  # not met before
    expected, found = both(method, layer, (x, weights, ids), monkeypatch)
    assert torch.equal(found, expected)
    wide = torch.randn(5, 2 * HIDDEN).bfloat16()[:, ::2]
    elsewhere = ids.clone()
    elsewhere[2, 1] = -1
    beyond = ids.clone()
    beyond[2, 1] = EXPERTS
    for given in ((wide, weights, ids), (x, weights.double(), ids), (x, weights, elsewhere), (x, weights, beyond)):
        assert at_once(method, layer, given, monkeypatch) is None
    with monkeypatch.context() as patch:
        patch.setattr(registry, "watcher", lambda op, name, run, site, args, kwargs: run(*args, **kwargs))
        assert at_once(method, layer, (x, weights, ids), monkeypatch) is None
    layer.gcu_w2_scales = layer.gcu_w2_scales * 2
    assert at_once(method, layer, (x, weights, ids), monkeypatch) is None  # replaced since
    expected, found = both(method, layer, (x, weights, ids), monkeypatch)
    assert torch.equal(found, expected)


def test_parts_of_two_mixtures_that_do_not_fit_are_the_usual_error(monkeypatch):
    """Both were met, each beside its own other part; together they would read past a row's end."""
    method, layer, other = method_of("int4"), layer_of("int4", "SILU"), layer_of("int4", "SILU")
    arguments = routed(5, torch.bfloat16, torch.int32)
    both(method, layer, arguments, monkeypatch)
    for name in ("weight", "scales", "zeros", "g_idx", "layout"):
        setattr(other, f"gcu_w2_{name}", getattr(layer, f"gcu_w13_{name}"))
    with pytest.raises(InvalidInputError):
        method.apply(other, *arguments, None, None)
    for name in ("weight", "scales", "zeros", "g_idx", "layout"):
        setattr(layer, f"gcu_w2_{name}", getattr(layer, f"gcu_w13_{name}"))
    with pytest.raises(InvalidInputError):
        method.apply(layer, *arguments, None, None)
