"""A sweep over batch sizes 1..64 and lengths 1..2048 compiles no more graphs than plain Inductor, at no point of it."""

import random

import pytest
import torch
import transformers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=16, n_head=2, n_layer=1),
}
# The corners that torch specialises on (0 and 1), and the largest of each.
CORNERS = ((2, 7), (1, 1), (64, 3), (1, 2048), (3, 1), (1, 2), (64, 128))


def shapes(count, seed=0):
    """(batch, length), both log-uniform; their product stays small enough for a test."""
    source = random.Random(seed)
    found = list(CORNERS)
    while len(found) < count:
        batch, length = int(64 ** source.random()), int(2048 ** source.random())
        if batch * length <= 1 << 14:
            found.append((batch, length))
    return found


def graphs_over(model, sizes, compiler, **options):
    """Graphs compiled so far, after each of the shapes."""
    torch.manual_seed(0)
    fn = transformers.AutoModel.from_config(MODELS[model](), attn_implementation="eager").eval()
    torch.compiler.reset()
    compiled = torch.compile(fn, backend=compiler, **options)
    stats = torch._dynamo.utils.counters["stats"]
    before, found = stats["unique_graphs"], []
    with torch.no_grad():
        for batch, length in sizes:
            compiled(torch.randint(2, 60, (batch, length)), use_cache=False)
            found.append(stats["unique_graphs"] - before)
    return found


def held(ours, plain):
    assert plain[-1] > 0 and all(a <= b for a, b in zip(ours, plain, strict=True)), (ours, plain)


@pytest.mark.parametrize(
    "model, count", [("llama", 10), *(pytest.param(name, 40, marks=pytest.mark.slow) for name in MODELS)]
)
def test_without_code_generation(model, count):
    """Dynamo's guards are Inductor's: the same graphs are compiled again for the same reasons."""
    sizes = shapes(count)
    plain = graphs_over(model, sizes, "aot_eager_decomp_partition")
    held(graphs_over(model, sizes, "gcu", options={"inductor": False}), plain)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("model", MODELS)
def test_against_plain_inductor(model, dynamic):
    sizes = shapes(150, seed=1)
    plain = graphs_over(model, sizes, "inductor", dynamic=dynamic)
    held(graphs_over(model, sizes, "gcu", dynamic=dynamic, options={"cache": False}), plain)
