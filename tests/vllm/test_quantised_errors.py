"""Damaged and unfit checkpoints in vLLM's layers: the error names the layer and the format."""

import layers
import pytest
import torch
from quantised import FORMS, Form

from gcu_compile.errors import CheckpointError

pytestmark = pytest.mark.vllm
K, N = 256, 192
NAME = "model.layers.3.mlp.down_proj"
# One of each format, and how its errors name it.
KINDS = {
    "gptq int4": "GPTQ int4",
    "gptq int8": "GPTQ int8",
    "awq int4": "AWQ int4",
    "w4a16 asymmetric": "compressed-tensors pack-quantized",
    "w8a16 groups, asymmetric": "compressed-tensors pack-quantized",
    "w8a8": "compressed-tensors int-quantized",
    "w8a8 static": "compressed-tensors int-quantized",
}


def stored(name):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / 16
    return FORMS[name].store(NAME, weight, (-4.0, 4.0))[0]


def load(name, tensors, kind="row"):
    layer = layers.make(kind, layers.configuration(FORMS[name].config()), NAME, K, N)
    layers.fill(layer, tensors, NAME)
    return layers.ready(layer)


@pytest.mark.parametrize("name", KINDS)
def test_truncated_tensors(name):
    """Each tensor of the layer in turn, half of it missing; in a whole layer and in a cut one."""
    tensors = stored(name)
    for key in tensors:
        if tensors[key].numel() < 4:
            continue
        cut = tensors[key][: len(tensors[key]) // 2]
        for rank, of in ((0, 1), (1, 2)):
            message = rf"{NAME} \({KINDS[name]}\): a tensor of .* does not fit.*truncated"
            with layers.shard(rank, of), pytest.raises(CheckpointError, match=message):
                load(name, {**tensors, key: cut}, "column")


@pytest.mark.parametrize("name", [*KINDS, "gptq int4 asymmetric act-order"])
def test_tensors_that_are_not_there(name):
    """vLLM leaves what was in memory."""
    tensors = stored(name)
    for key in tensors:
        if key.endswith(("weight_shape", "qzeros", "g_idx")) and FORMS[name].symmetric:
            continue  # says nothing that is not known
        if key.endswith("weight_shape"):
            continue
        kind, lacking = KINDS.get(name, "GPTQ int4"), key.removeprefix(f"{NAME}.")
        message = rf"{NAME} \({kind}( int\d)?\): the checkpoint lacks {lacking}"
        with layers.shard(), pytest.raises(CheckpointError, match=message):
            load(name, {other: tensors[other] for other in tensors if other != key})


@pytest.mark.parametrize("name", KINDS)
def test_a_part_that_is_not_there(name):
    tensors, prefix = stored(name), "model.layers.3.mlp.gate_up_proj"
    with layers.shard():
        layer = layers.make("merged", layers.configuration(FORMS[name].config()), prefix, K, [N, N])
        layers.fill(layer, tensors, NAME, 1)
        with pytest.raises(CheckpointError, match=rf"{prefix} \(.*\): the checkpoint lacks 1 of the 2 parts of "):
            layers.ready(layer)


@pytest.mark.parametrize("how", ["sharded state", "a loader of the model's own", "a part without outputs"])
def test_what_is_filled_in_another_way_is_not_missed(how):
    from vllm.config import get_current_vllm_config

    name = "w8a8"
    with layers.shard():
        if how == "sharded state":
            get_current_vllm_config().load_config.load_format = "sharded_state"
        if how == "a part without outputs":  # keys and values alone
            layer = layers.make("merged", layers.configuration(FORMS[name].config()), NAME, K, [0, N, N])
            for part in (1, 2):
                layers.fill(layer, stored(name), NAME, part)
        else:
            layer = layers.make("row", layers.configuration(FORMS[name].config()), NAME, K, N)
            for key, tensor in stored(name).items():
                parameter = layer.get_parameter(key.removeprefix(f"{NAME}."))
                parameter.data.copy_(tensor)
                if how == "a loader of the model's own":
                    parameter.weight_loader = lambda param, loaded: param.data.copy_(loaded)
        layers.ready(layer)


def test_group_indices_of_a_copied_parameter():
    """Reloading puts new parameters in the place of the old, with their attributes."""
    name, tensors = act_order()
    with layers.shard():
        layer = layers.make("row", layers.configuration(FORMS[name].config()), NAME, K, N)
        layers.fill(layer, tensors, NAME)
        old = layer.g_idx
        new = type(old)(data=torch.zeros_like(old.data), input_dim=0, weight_loader=old.weight_loader)
        new.__dict__.update({key: value for key, value in old.__dict__.items() if key not in new.__dict__})
        new.weight_loader(new, tensors[f"{NAME}.g_idx"])
        assert torch.equal(new.data, tensors[f"{NAME}.g_idx"])


@pytest.mark.parametrize("name", KINDS)
def test_dummy_weights_are_not_missed(name):
    from vllm.config import get_current_vllm_config

    with layers.shard():
        get_current_vllm_config().load_config.load_format = "dummy"
        layer = layers.make("row", layers.configuration(FORMS[name].config()), NAME, K, N)
        for parameter in layer.parameters():
            if parameter.is_floating_point():  # as vLLM does; words hold what was in memory
                parameter.data.uniform_(-1e-3, 1e-3)
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("name", KINDS)
def test_scales_of_nan(name):
    tensors = stored(name)
    (key,) = [key for key in tensors if key.endswith(("scales", "weight_scale"))]
    tensors[key].view(-1)[7] = torch.nan
    message = rf"{NAME} \({KINDS[name]}( int\d)?\): 1 scales are NaN or infinite"
    with layers.shard(), pytest.raises(CheckpointError, match=message):
        load(name, tensors)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_scale_of_static_activations(value):
    tensors = stored("w8a8 static")
    tensors[f"{NAME}.input_scale"].fill_(value)
    message = rf"{NAME} \({KINDS['w8a8 static']} int8\): input_scale must be positive"
    with layers.shard(), pytest.raises(CheckpointError, match=message):
        load("w8a8 static", tensors)


@pytest.mark.parametrize("name", ["gptq int4", "gptq int8", "awq int4", "w4a16", "w8a16 groups, asymmetric"])
def test_group_that_does_not_divide_the_inputs(name):
    form = FORMS[name]
    with layers.shard():
        config = layers.configuration(form.config())
        with pytest.raises(CheckpointError, match=rf"(?s){NAME} \(.*groups of {form.group} .*do not divide 200"):
            layers.make("row", config, NAME, 200, N)


@pytest.mark.parametrize("name", ["gptq int4", "gptq int8", "awq int4", "w4a16", "w4a16 asymmetric"])
def test_group_across_a_shard(name):
    """384 inputs on two ranks are 192 each: three groups of 64 fit, one and a half of 128 do not."""
    form = Form(FORMS[name].method, FORMS[name].bits, 128, FORMS[name].symmetric)
    with layers.shard(0, 2):
        config = layers.configuration(form.config())
        with pytest.raises(CheckpointError, match=rf"{NAME} \(.*128.*192|{NAME} \(.*192.*128"):
            layers.make("row", config, NAME, 384, N)


def act_order():
    name = "gptq int4 asymmetric act-order"
    return name, stored(name)


def test_group_index_out_of_range():
    name, tensors = act_order()
    tensors[f"{NAME}.g_idx"][5] = K // 64
    with layers.shard(), pytest.raises(CheckpointError, match=rf"{NAME} \(GPTQ int4\): g_idx must be \[256\]"):
        load(name, tensors)


def test_group_index_out_of_order_where_the_configuration_denies_it():
    tensors = stored("gptq int4")
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].flip(0)
    with layers.shard(), pytest.raises(CheckpointError, match=rf"{NAME} \(GPTQ int4\): g_idx is not in order"):
        load("gptq int4", tensors)


def test_group_indices_of_merged_parts_differ():
    name, tensors = act_order()
    prefix = "model.layers.3.mlp.gate_up_proj"
    with layers.shard():
        layer = layers.make("merged", layers.configuration(FORMS[name].config()), prefix, K, [N, N])
        layers.fill(layer, tensors, NAME, 0)
        tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].flip(0)
        with pytest.raises(CheckpointError, match=rf"{prefix} \(GPTQ\): its merged parts .* different g_idx"):
            layers.fill(layer, tensors, NAME, 1)


@pytest.mark.parametrize("name", ["gptq int4", "awq int4", "w4a16 asymmetric"])
def test_words_that_a_part_does_not_fill(name):
    with layers.shard():
        config = layers.configuration(FORMS[name].config())
        message = r"gate_up_proj \(.*words of 8 (codes|zeros) do not divide.*\[190, 194\]"
        with pytest.raises(CheckpointError, match=message):
            layers.make("merged", config, "model.layers.3.mlp.gate_up_proj", K, [190, 194])
