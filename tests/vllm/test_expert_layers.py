"""The experts of a mixture in vLLM's layers, without an engine: every format, whole or cut; damaged checkpoints."""

import layers
import pytest
import torch
from quantised import FORMS, Form

from gcu_compile.errors import CheckpointError, UnsupportedFeatureError
from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.quantize.rounding import FORMATS, to_nearest

pytestmark = pytest.mark.vllm
EXPERTS, TOP, HIDDEN, INNER, ROWS = 4, 2, 256, 128, 9
PREFIX = "model.layers.1.mlp.experts"
PROJECTIONS = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}  # gate, up, down
# A form of each kind of experts, and how errors name it.
KINDS = {
    "gptq int4": "GPTQ",
    "gptq int4 v2 asymmetric": "GPTQ",
    "gptq int8": "GPTQ",
    "awq int4": "AWQ int4",
    "w4a16": "packed",
    "w4a16 asymmetric": "packed",
    "w8a16": "packed",
    "w8a8": "int8",
    "w8a8 static asymmetric": "int8",
}


def weight(part, expert):
    generator = torch.Generator().manual_seed(10 * expert + int(part[1]))
    return torch.randn(*PROJECTIONS[part], generator=generator) / 16


def stored(name):
    """((part, expert) -> tensors of the checkpoint, (part, expert) -> the numbers that they stand for)."""
    tensors, numbers = {}, {}
    for part in PROJECTIONS:
        for expert in range(EXPERTS):
            tensors[part, expert], numbers[part, expert] = FORMS[name].store(part, weight(part, expert), (-4.0, 4.0))
    return tensors, numbers


def make(name, of=1):
    return layers.experts(layers.configuration(FORMS[name].config()), PREFIX, EXPERTS, HIDDEN, INNER, of)


def fill(layer, tensors):
    for (part, expert), each in tensors.items():
        layers.fill_expert(layer, each, part, part, expert)
    return layer


def routed():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, HIDDEN, generator=generator)
    weights, ids = torch.rand(ROWS, EXPERTS, generator=generator).topk(TOP)
    return x, weights, ids.int()


def apply(layer, x, weights, ids):
    return layers.ready(layer).quant_method.apply(layer, x, weights, ids, None, None).double()


def expected(form, numbers, x, weights, ids):
    """In float64, of what is stored; activations quantised where the form does that."""
    y = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
    for row in range(ROWS):
        for share, expert in zip(weights[row], ids[row].tolist(), strict=True):
            given = form.inputs(x[row : row + 1], (-4.0, 4.0)).double()
            gate, up = (given @ numbers[part, expert].double().T for part in ("w1", "w3"))
            inner = (torch.nn.functional.silu(gate) * up).float()
            y[row] += share * (form.inputs(inner, (-4.0, 4.0)).double() @ numbers["w2", expert].double().T)[0]
    return y


@pytest.mark.parametrize("name", [*KINDS, "gptq int4 asymmetric act-order"])
def test_experts_are_their_numbers(name):
    tensors, numbers = stored(name)
    with layers.shard():
        found = apply(fill(make(name), tensors), *routed())
    check(FORMS[name], found, expected(FORMS[name], numbers, *routed()))


def check(form, found, meant):
    if form.activations:  # a code may be one step from that of an inner number that was rounded otherwise
        assert (found - meant).norm() < 2e-3 * meant.norm()
    else:
        torch.testing.assert_close(found, meant, **tolerance(torch.float32, HIDDEN + INNER))


@pytest.mark.parametrize("name", KINDS)
def test_two_shards_together_are_the_experts(name):
    """Gate's and up's outputs and down's inputs are cut."""
    tensors, numbers = stored(name)
    found = 0
    for rank in range(2):
        with layers.shard(rank, 2):
            found = found + apply(fill(make(name, 2), tensors), *routed())
    if FORMS[name].activations:  # a shard's tokens have scales of their own between the products
        meant = expected(FORMS[name], numbers, *routed())
        assert (found - meant).norm() < 2e-2 * meant.norm()
    else:
        check(FORMS[name], found, expected(FORMS[name], numbers, *routed()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("of", [1, 2])
def test_float_experts_that_a_name_rounds(name, of):
    from vllm.model_executor.layers.quantization import get_quantization_config

    import vllm_integration

    vllm_integration.register()
    form = FORMS["w8a8" if FORMATS[name].activations else "w4a16"]
    floats = {(part, expert): weight(part, expert) for part in PROJECTIONS for expert in range(EXPERTS)}
    for rank in range(of):
        numbers = {key: rounded(name, w.chunk(of, int(key[0] == "w2"))[rank]) for key, w in floats.items()}
        with layers.shard(rank, of):
            layer = layers.experts(get_quantization_config(name)(), PREFIX, EXPERTS, HIDDEN, INNER, of)
            found = apply(fill(layer, {key: {f"{key[0]}.weight": w} for key, w in floats.items()}), *routed())
        check(form, found, expected(form, numbers, *routed()))


def rounded(name, weight):
    """The numbers that a shard's weight is rounded to."""
    form, (n, k) = FORMATS[name], weight.shape
    codes, scales = to_nearest(weight, form.bits, form.group_size(k))
    return (codes.view(n, scales.shape[1], -1) * scales.unsqueeze(-1)).view(n, k)


@pytest.mark.parametrize("name", FORMATS)
def test_float_experts_in_one_tensor(name):
    """As Llama 4 loads them: all experts' gates, ups and downs at once."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    import vllm_integration

    vllm_integration.register()
    with layers.shard():
        layer = layers.experts(get_quantization_config(name)(), PREFIX, EXPERTS, HIDDEN, INNER)
        for part in PROJECTIONS:
            stored = "w2_weight" if part == "w2" else "w13_weight"
            all_of_them = [weight(part, expert) for expert in range(EXPERTS)]
            parameter = layer.get_parameter(stored)
            parameter.weight_loader(parameter, torch.stack(all_of_them), stored, shard_id=part, expert_id=0)
        found = apply(layer, *routed())
    numbers = {(p, e): rounded(name, weight(p, e)) for p in PROJECTIONS for e in range(EXPERTS)}
    form = FORMS["w8a8" if FORMATS[name].activations else "w4a16"]
    check(form, found, expected(form, numbers, *routed()))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rank, of", [(0, 1), (1, 2)])
def test_truncated_tensors(name, rank, of):
    """Each tensor of each projection of one expert in turn, half of it missing, along each dimension."""
    tensors, _ = stored(name)
    for part in PROJECTIONS:
        for key, tensor in tensors[part, 3].items():
            if tensor.numel() < 4 or key.endswith("g_idx"):
                continue
            for dim in (d for d in range(tensor.dim()) if tensor.shape[d] > 1):
                cut = {**tensors[part, 3], key: tensor.narrow(dim, 0, tensor.shape[dim] // 2)}
                message = rf"{PREFIX} \({KINDS[name]} experts\): a tensor of .* does not fit.*truncated"
                with layers.shard(rank, of), pytest.raises(CheckpointError, match=message):
                    layers.fill_expert(make(name, of), cut, part, part, 3)


@pytest.mark.parametrize("name", KINDS)
def test_tensors_that_are_not_there(name):
    tensors, _ = stored(name)
    for part in PROJECTIONS:
        for key in tensors[part, 3]:
            if key.endswith(("weight_shape", "g_idx")) or (key.endswith("qzeros") and FORMS[name].symmetric):
                continue  # says nothing that is not known
            rest = {**tensors, (part, 3): {other: t for other, t in tensors[part, 3].items() if other != key}}
            lacking = f"1 of the {EXPERTS if part == 'w2' else 2 * EXPERTS} parts of "
            message = rf"{PREFIX} \({KINDS[name]} experts\): the checkpoint lacks {lacking}"
            with layers.shard(), pytest.raises(CheckpointError, match=message):
                layers.ready(fill(make(name), rest))


@pytest.mark.parametrize("name", KINDS)
def test_random_weights_are_not_missed(name):
    from vllm.config import get_current_vllm_config

    with layers.shard():
        get_current_vllm_config().load_config.load_format = "dummy"
        layer = make(name)
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                parameter.data.uniform_(-1e-3, 1e-3)
        layers.ready(layer)


@pytest.mark.parametrize("name", KINDS)
def test_scales_of_nan(name):
    tensors, _ = stored(name)
    (key,) = [key for key in tensors["w2", 2] if key.endswith(("scales", "weight_scale"))]
    tensors["w2", 2][key].view(-1)[3] = torch.nan
    with layers.shard(), pytest.raises(CheckpointError, match=rf"{PREFIX}.2.w2 \(.*int\d.*\): 1 scales are NaN"):
        layers.ready(fill(make(name), tensors))


@pytest.mark.parametrize("name", ["gptq int4", "awq int4", "w4a16"])
def test_groups_that_do_not_divide(name):
    form = Form(FORMS[name].method, FORMS[name].bits, 96, FORMS[name].symmetric)
    message = rf"{PREFIX} \(.* experts\): groups of 96 do not divide 256 hidden inputs"
    with layers.shard(), pytest.raises(CheckpointError, match=message):
        layers.experts(layers.configuration(form.config()), PREFIX, EXPERTS, HIDDEN, INNER)


def test_group_index_out_of_order_where_the_configuration_denies_it():
    tensors, _ = stored("gptq int4")
    tensors["w1", 2]["w1.g_idx"] = tensors["w1", 2]["w1.g_idx"].flip(0)
    message = rf"{PREFIX}.2 \(GPTQ\): g_idx is not in order, and the configuration says desc_act false"
    with layers.shard(), pytest.raises(CheckpointError, match=message):
        fill(make("gptq int4"), tensors)


@pytest.mark.parametrize("name", ["gptq int4", "gptq int4 asymmetric act-order"])
def test_group_index_that_is_truncated(name):
    tensors, _ = stored(name)
    tensors["w2", 1]["w2.g_idx"] = tensors["w2", 1]["w2.g_idx"][:50]
    message = rf"{PREFIX} \(GPTQ experts\): a tensor of \[50\] does not fit"
    with layers.shard(), pytest.raises(CheckpointError, match=message):
        fill(make(name), tensors)


def test_group_indices_out_of_range_and_of_gate_and_up_that_differ():
    name = "gptq int4 asymmetric act-order"
    tensors, _ = stored(name)
    tensors["w2", 1]["w2.g_idx"][5] = 99
    with layers.shard(), pytest.raises(CheckpointError, match=rf"{PREFIX}.1.w2 \(GPTQ int4\): g_idx must be \[128\]"):
        layers.ready(fill(make(name), tensors))
    tensors["w3", 1]["w3.g_idx"] = tensors["w3", 1]["w3.g_idx"].flip(0)
    with layers.shard(), pytest.raises(CheckpointError, match=rf"{PREFIX}.1 \(GPTQ\): gate and up have different"):
        fill(make(name), tensors)


def test_act_order_is_for_one_rank():
    message = rf"{PREFIX}: GPTQ experts with desc_act in tensor parallel"
    with layers.shard(0, 2), pytest.raises(UnsupportedFeatureError, match=message):
        make("gptq int4 asymmetric act-order", 2)
