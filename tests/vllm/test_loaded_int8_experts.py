"""compressed-tensors W8A8 experts in vLLM's layer, without an engine: loaded from a checkpoint's tensors, applied."""

import layers
import pytest
import torch
from quantised import FORMS, Form

from gcu_compile.errors import CheckpointError, UnsupportedFeatureError
from gcu_compile.kernels import registry

pytestmark = pytest.mark.vllm
NAME, EXPERTS, TOP, HIDDEN, INNER, TOKENS = "model.layers.3.mlp.experts", 4, 2, 64, 96, 17
PROJECTIONS = {"gate_proj": ("w1", INNER, HIDDEN), "up_proj": ("w3", INNER, HIDDEN), "down_proj": ("w2", HIDDEN, INNER)}
W8A8 = {name: form for name, form in FORMS.items() if form.activations}
W8A8["w8a8 per tensor"] = Form("compressed", bits=8, group=0, activations="dynamic")
W8A8["w8a8 static asymmetric per tensor"] = Form(
    "compressed", bits=8, group=0, activations="static", inputs_symmetric=False
)


def reach(expert, projection):
    """What its activations were in calibration: each expert another, gate and up the same."""
    return (-2.0 - expert, 1.5 + expert) if projection == "down_proj" else (-3.0 - expert / 2, 3.5)


def stored(form, expert, projection):
    """(tensors of the checkpoint, the weight that they stand for)"""
    _, n, k = PROJECTIONS[projection]
    g = torch.Generator().manual_seed(100 * expert + len(projection))
    return form.store("", torch.randn(n, k, generator=g) * 2 / k**0.5, reach(expert, projection))


def make(config, of=1):
    return layers.experts(layers.configuration(config), NAME, EXPERTS, HIDDEN, INNER, of)


def fill(layer, form, change=lambda expert, projection, tensors: tensors):
    for expert in range(EXPERTS):
        for projection, (part, _, _) in PROJECTIONS.items():
            tensors = change(expert, projection, stored(form, expert, projection)[0])
            layers.fill_expert(layer, tensors, "", part, expert)
    return layers.ready(layer)


def routed():
    g = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, HIDDEN, generator=g)
    return x, *torch.rand(TOKENS, EXPERTS - 1, generator=g).topk(TOP)  # the last expert has no rows


def expected(form, x, weights, ids):
    """Token by token, by the numbers that the checkpoint stands for."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):

            def product(row, projection, expert=expert):
                numbers = stored(form, expert, projection)[1].double()
                return numbers @ form.inputs(row[None].float(), reach(expert, projection))[0].double()

            gate, up = product(row, "gate_proj"), product(row, "up_proj")
            y[token] += weight * product(torch.nn.functional.silu(gate) * up, "down_proj")
    return y


@pytest.mark.parametrize("name", W8A8)
def test_experts_are_their_numbers(name):
    form, (x, weights, ids) = W8A8[name], routed()
    with layers.shard():
        layer = fill(make(form.config()), form)
        before = registry.calls["int8_gemm_grouped", "host_cpp"]
        y = layer.quant_method.apply(layer, x, weights, ids.int(), None, None)
        again = layer.quant_method.apply(layer, x, weights, ids.int(), None, None)  # known by now: in one go
    assert registry.calls["int8_gemm_grouped", "host_cpp"] == before + 4 and torch.equal(y, again)
    meant = expected(form, x, weights, ids)
    # A code may be one step from that of an inner number that was rounded otherwise.
    assert (y.double() - meant).norm() < 2e-3 * meant.norm()


@pytest.mark.parametrize("name", ["w8a8 static", "w8a8 static asymmetric per tensor"])
def test_shards_together_are_the_layer(name):
    """Outputs of gate and up and inputs of down are cut; a scale of the whole is that of each part."""
    form, (x, weights, ids), y = W8A8[name], routed(), 0
    for rank in range(2):
        with layers.shard(rank, 2):
            layer = fill(make(form.config(), 2), form)
            y = y + layer.quant_method.apply(layer, x, weights, ids.int(), None, None)
    meant = expected(form, x, weights, ids)
    # A code may be one step from that of an inner number that was rounded otherwise.
    assert (y.double() - meant).norm() < 2e-3 * meant.norm()


def test_gate_and_up_that_were_calibrated_apart_share_the_wider_range():
    form = W8A8["w8a8 static"]

    def wider(expert, projection, tensors):
        return {**tensors, ".input_scale": tensors[".input_scale"] * (2 if projection == "up_proj" else 1)}

    with layers.shard():
        layer = fill(make(form.config()), form, wider)
    with layers.shard():
        same = fill(make(form.config()), form)
    assert torch.equal(layer.gcu_w13_x_scales, same.gcu_w13_x_scales * 2)
    assert torch.equal(layer.gcu_w2_x_scales, same.gcu_w2_x_scales)


@pytest.mark.parametrize("tensor", ["input_scale", "input_zero_point", "weight_scale"])
def test_a_tensor_that_is_not_there(tensor):
    form = W8A8["w8a8 static asymmetric per tensor"]

    def without(expert, projection, tensors):
        lost = expert == 2 and projection == "up_proj"
        return {name: one for name, one in tensors.items() if not (lost and name == f".{tensor}")}

    message = rf"{NAME} \(int8 experts\): the checkpoint lacks 1 of the 8 parts of w13_{tensor}"
    with layers.shard(), pytest.raises(CheckpointError, match=message):
        fill(make(form.config()), form, without)


def test_a_scale_that_is_several():
    form = W8A8["w8a8 static"]

    def twice(expert, projection, tensors):
        return {**tensors, ".input_scale": torch.ones(2)}

    message = rf"{NAME} \(int8 experts\): a tensor of \[2\] does not fit its place"
    with layers.shard(), pytest.raises(CheckpointError, match=message):
        fill(make(form.config()), form, twice)


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        ({"symmetric": False}, {}, r"weights asymmetric per channel \(static\), .*expected symmetric weights"),
        ({}, {"strategy": "tensor"}, r"activations symmetric per tensor \(dynamic\)"),
        ({"strategy": "group", "group_size": 32}, {}, r"weights symmetric per group"),
    ],
)
def test_a_scheme_without_a_product_is_named(weights, inputs, message):
    config = W8A8["w8a8"].config()
    config["config_groups"]["group_0"]["weights"] |= weights
    config["config_groups"]["group_0"]["input_activations"] |= inputs
    with layers.shard(), pytest.raises(UnsupportedFeatureError, match=rf"{NAME} \(.*W8A8 experts\): .*{message}"):
        make(config)


def test_what_vllm_does_not_take_names_the_layer():
    """4 bits with one scale for the weight: nobody's scheme for experts."""
    config, message = Form("compressed", group=0).config(), "vLLM has no method for this scheme"
    with layers.shard(), pytest.raises(UnsupportedFeatureError, match=rf"{NAME} \(.* pack-quantized.*\): {message}"):
        make(config)
