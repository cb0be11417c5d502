"""Every checkpoint format in vLLM's layers, without an engine: merged or not, whole or cut for tensor parallel."""

import layers
import pytest
import torch
from quantised import FORMS, Form

from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.quantize import rounding

pytestmark = pytest.mark.vllm
K, N, ROWS = 256, 192, 5
NAME = "model.layers.3.mlp.down_proj"
REACH = (-4.0, 3.0)


def weight(n=N, k=K, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5


def inputs(k=K):
    return torch.randn(ROWS, k, generator=torch.Generator().manual_seed(9))


def expected(form: Form, x, numbers):
    """In float64, of what is stored."""
    return form.inputs(x, REACH).double() @ numbers.double().T


def close(form: Form, found, x, numbers):
    torch.testing.assert_close(found.double(), expected(form, x, numbers), **tolerance(torch.float32, x.shape[-1]))


@pytest.mark.parametrize("name", FORMS)
def test_layer_is_its_numbers(name):
    form, x = FORMS[name], inputs()
    tensors, numbers = form.store(NAME, weight(), REACH)
    with layers.shard():
        layer = layers.make("row", layers.configuration(form.config()), NAME, K, N)
        layers.fill(layer, tensors, NAME)
        close(form, layers.apply(layers.ready(layer), x), x, numbers)
    if form.bits == 4 or not form.activations:
        assert layer.gcu_weight.dtype == torch.int32  # the host's own layout, not unpacked numbers


@pytest.mark.parametrize("name", FORMS)
def test_its_library_is_built_from_when_it_is_made(name, monkeypatch):
    from vllm_integration.quantization import layer as ours

    asked = []
    monkeypatch.setattr(ours, "load_ahead", lambda *libraries: asked.append(libraries))
    ours._build_ahead.cache_clear()
    with layers.shard():
        for _ in range(2):
            layers.make("row", layers.configuration(FORMS[name].config()), NAME, K, N)
    ours._build_ahead.cache_clear()
    assert asked == [("int8_gemm",) if FORMS[name].activations else ("dequant_gemm",)]


@pytest.mark.parametrize("name", FORMS)
def test_merged_projections(name):
    form, x, heads = FORMS[name], inputs(), (4, 2)
    prefix, parts = "model.layers.0.self_attn", dict(zip(layers.QKV, (128, 64, 64), strict=True))
    with layers.shard():
        layer = layers.make("qkv", layers.configuration(form.config()), f"{prefix}.qkv_proj", K, list(heads))
        all_numbers = []
        for seed, (part, n) in enumerate(parts.items()):
            tensors, numbers = form.store(f"{prefix}.{part}", weight(n, seed=seed), REACH)
            layers.fill(layer, tensors, f"{prefix}.{part}", part[0])
            all_numbers.append(numbers)
        close(form, layers.apply(layers.ready(layer), x), x, torch.cat(all_numbers))


@pytest.mark.parametrize("name", ["w8a8 static", "w8a8 static asymmetric", "w8a8 static per tensor"])
def test_parts_that_were_calibrated_apart(name):
    """The layer's inputs are quantised once: by a range that holds every part's, in whatever order they are loaded."""
    form, x = FORMS[name], inputs().clamp(-3.9, 2.9)
    for widest in range(2):
        reaches = [(-1.0, 0.5), (-0.25, 1.0)]
        reaches[widest] = REACH
        with layers.shard():
            config = layers.configuration(form.config())
            layer = layers.make("merged", config, "model.layers.3.mlp.gate_up_proj", K, [N, N])
            numbers = []
            for index, reach in enumerate(reaches):
                tensors, part = form.store(NAME, weight(seed=index), reach)
                layers.fill(layer, tensors, NAME, index)
                numbers.append(part)
            found = layers.apply(layers.ready(layer), x).double()
        exact = x.double() @ torch.cat(numbers).double().T
        assert (found - exact).norm() < 0.02 * exact.norm()  # 7 / 255 a step; of a clipped input far more


@pytest.mark.parametrize("name", FORMS)
def test_shards_together_are_the_layer(name):
    """Two ranks: outputs cut, side by side; inputs cut, added up; gate and up merged and cut."""
    form, x = FORMS[name], inputs()
    tensors, numbers = form.store(NAME, weight(), REACH)
    gate, up = (form.store(NAME, weight(seed=seed), REACH) for seed in (1, 2))
    whole = expected(form, x, numbers)
    columns, rows, merged = [], torch.zeros(ROWS, N, dtype=torch.float64), []
    for rank in range(2):
        part = x[:, rank * K // 2 : (rank + 1) * K // 2]
        with layers.shard(rank, 2):
            config = layers.configuration(form.config())
            layer = layers.make("column", config, NAME, K, N)
            layers.fill(layer, tensors, NAME)
            columns.append(layers.apply(layers.ready(layer), x))
            layer = layers.make("row", config, NAME, K, N)
            layers.fill(layer, tensors, NAME)
            cut = layers.apply(layers.ready(layer), part)
            own = numbers[:, rank * K // 2 : (rank + 1) * K // 2]
            torch.testing.assert_close(
                cut.double(), form.inputs(part, REACH).double() @ own.double().T, **tolerance(torch.float32, K)
            )
            rows += cut
            layer = layers.make("merged", config, "model.layers.3.mlp.gate_up_proj", K, [N, N])
            for index, (stored, _) in enumerate((gate, up)):
                layers.fill(layer, stored, NAME, index)
            merged.append(layers.apply(layers.ready(layer), x).chunk(2, dim=-1))
    close(form, torch.cat(columns, -1), x, numbers)
    if form.activations != "dynamic":  # a shard's tokens have scales of their own
        torch.testing.assert_close(rows, whole, **tolerance(torch.float32, K))
    for index, (_, own) in enumerate((gate, up)):
        close(form, torch.cat([parts[index] for parts in merged], -1), x, own)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("of", [1, 2])
def test_a_merged_layer_that_is_one_tensor(name, of):
    """Phi-3's qkv_proj and gate_up_proj, Qwen's c_attn."""
    form, x, found = FORMS[name], inputs(), []
    tensors, numbers = form.store(NAME, weight(2 * N), REACH)
    for rank in range(of):
        with layers.shard(rank, of):
            config = layers.configuration(form.config())
            layer = layers.make("merged", config, "model.layers.3.mlp.gate_up_proj", K, [N, N])
            layers.fill(layer, tensors, NAME)
            found.append(layers.apply(layers.ready(layer), x).chunk(2, dim=-1))
    close(form, torch.cat([torch.cat(part, -1) for part in zip(*found, strict=True)], -1), x, numbers)


def absorbed(config, tensors):
    """The weight that latent attention gets of its `kv_b_proj`."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

    layer = layers.make("column", config, NAME, K, N)
    layer._cpu_skip_gemm_dispatch = True  # set by vLLM's attention layer
    layers.fill(layer, tensors, NAME)
    return get_and_maybe_dequant_weights(layers.ready(layer), torch.float32)


@pytest.mark.parametrize("name", FORMS)
def test_latent_attention_takes_the_numbers(name):
    """Int8 activations have no part in them: a static scale would clip the ones of an identity."""
    tensors, numbers = FORMS[name].store(NAME, weight(), (-0.25, 0.25))
    with layers.shard():
        found = absorbed(layers.configuration(FORMS[name].config()), tensors)
    torch.testing.assert_close(found, numbers, **tolerance(torch.float32, 1))


@pytest.mark.parametrize("name", rounding.FORMATS)
def test_latent_attention_takes_the_numbers_that_a_name_rounds_to(name):
    from vllm.model_executor.layers.quantization import get_quantization_config

    import vllm_integration

    vllm_integration.register()
    form = rounding.FORMATS[name]
    codes, scales = rounding.to_nearest(weight(), form.bits, form.group_size(K, K))
    numbers = codes * scales.float().repeat_interleave(K // scales.shape[1], 1)
    with layers.shard():
        found = absorbed(get_quantization_config(name)(), {f"{NAME}.weight": weight()})
    torch.testing.assert_close(found, numbers, **tolerance(torch.float32, 1))


@pytest.mark.parametrize("name", ["gptq int4", "gptq int8 v2 asymmetric act-order", "w4a16 asymmetric", "w8a8"])
@pytest.mark.parametrize("vocabulary", [256, 200])
@pytest.mark.parametrize("of", [1, 2])
def test_quantised_head(name, vocabulary, of):
    """vLLM pads a vocabulary to 64 a rank; the padding's outputs are cut off by its logits processor."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    form, x, found = FORMS[name], inputs(), []
    config = {**form.config(), "lm_head": True, "ignore": []}
    tensors, numbers = form.store("lm_head", weight(vocabulary), REACH)
    for rank in range(of):
        with layers.shard(rank, of):
            made = layers.configuration(config)
            if form.method == "compressed":
                made.target_scheme_map = {"lm_head": made.target_scheme_map["Linear"]}
            head = ParallelLMHead(vocabulary, K, params_dtype=torch.float32, quant_config=made, prefix="lm_head")
            layers.fill(head, tensors, "lm_head")
            found.append(layers.apply(layers.ready(head), x))
    close(form, torch.cat(found, -1)[:, :vocabulary], x, numbers)


@pytest.mark.parametrize("name", ["w4a16", "w4a16 per output", "w8a16"])
def test_quantised_embedding(name):
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    form = FORMS[name]
    tensors, numbers = form.store("model.embed_tokens", weight(256), REACH)
    ids = torch.tensor([0, 3, 255, 3])
    with layers.shard():
        made = layers.configuration(form.config())
        made.target_scheme_map = {"model.embed_tokens": made.target_scheme_map["Linear"]}
        table = VocabParallelEmbedding(
            256, K, params_dtype=torch.float32, quant_config=made, prefix="model.embed_tokens"
        )
        layers.fill(table, tensors, "model.embed_tokens")
        table.quant_method.process_weights_after_loading(table)
        assert torch.equal(table(ids), numbers[ids])
