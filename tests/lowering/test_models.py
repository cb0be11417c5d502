"""Random models of transformers: all attention fused, and the result is that of float64 within the table."""

import copy

import pytest
import torch
import transformers
from tiny import LLAMA

from gcu_compile import backend
from gcu_compile.kernels.tolerance import tolerance

SMALL = {**{k: LLAMA[k] for k in LLAMA if k != "num_key_value_heads"}, "hidden_size": 64, "intermediate_size": 96}
GQA = {**SMALL, "num_key_value_heads": 2}
LAYERS = SMALL["num_hidden_layers"]
# model -> (configuration, what each rule must find, as a function of the number of layers)
MODELS = {
    "llama": (transformers.LlamaConfig(**GQA), {"rms_norm": 2 * LAYERS + 1, "gated_activation": LAYERS}),
    "qwen2": (transformers.Qwen2Config(**GQA), {"rms_norm": 2 * LAYERS + 1, "gated_activation": LAYERS}),
    "mistral": (
        transformers.MistralConfig(**GQA, sliding_window=5),
        {"rms_norm": 2 * LAYERS + 1, "gated_activation": LAYERS},
    ),
    "gemma2": (
        transformers.Gemma2Config(**GQA, head_dim=16, sliding_window=5),
        {"rms_norm": 4 * LAYERS + 1, "gated_activation": LAYERS},
    ),
    "bloom": (
        transformers.BloomConfig(vocab_size=272, hidden_size=64, n_layer=LAYERS, n_head=4),
        {"layer_norm": 2 * LAYERS + 2, "rotary": 0},
    ),
    "gpt_neox": (transformers.GPTNeoXConfig(**SMALL), {"layer_norm": 2 * LAYERS + 1}),
    "phi3": (transformers.Phi3Config(**GQA), {"rms_norm": 2 * LAYERS + 1, "gated_activation": LAYERS}),
    "mixtral": (transformers.MixtralConfig(**GQA, num_local_experts=4), {"rms_norm": 2 * LAYERS + 1}),
}
RUNS = [(name, "eager", torch.float32) for name in MODELS]
RUNS += [("mistral", "sdpa", torch.bfloat16), ("bloom", "eager", torch.bfloat16)]
# transformers' Bloom has no SDPA
RUNS += [
    pytest.param(name, "sdpa", torch.float32, marks=[] if name == "llama" else pytest.mark.slow)
    for name in MODELS
    if name != "bloom"
]


def model_of(name, implementation, dtype):
    config = copy.deepcopy(MODELS[name][0])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the default spread of 0.02 would hide a wrong mask
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.to(dtype)


def found():
    return sum((report.fused for report in backend.reports), start=type(backend.reports[0].fused)())


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    backend.reports.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name, implementation, dtype", RUNS)
def test_all_attention_is_fused(name, implementation, dtype):
    model = model_of(name, implementation, dtype)
    tokens = torch.randint(2, 272, (2, 13))
    compiled = torch.compile(model, backend="gcu", options={"inductor": False})
    with torch.no_grad():
        actual = compiled(input_ids=tokens, use_cache=False).logits
        model.config._experts_implementation = "eager"  # the grouped product of experts has no float64
        expected = model.double()(input_ids=tokens, use_cache=False).logits
    fused, wanted = found(), {"attention": LAYERS, "rotary": 2 * LAYERS, **MODELS[name][1]}
    assert {rule: fused[rule] for rule in wanted} == wanted
    # A model is a chain of sums of hidden size in several roundings a layer: 8 of them here.
    length = 8 * LAYERS * SMALL["intermediate_size"]
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, **tolerance(dtype, length, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma2_with_symbolic_sizes(dtype):
    """Under dynamic=True Dynamo makes graph inputs of a model's numbers, the soft caps among them."""
    model = model_of("gemma2", "eager", dtype)
    compiled = torch.compile(model, backend="gcu", dynamic=True, options={"inductor": False})
    batches = [torch.randint(2, 272, shape) for shape in ((2, 13), (3, 9))]
    with torch.no_grad():
        actual = [compiled(input_ids=tokens, use_cache=False).logits for tokens in batches]
        model.double()
        for tokens, result in zip(batches, actual, strict=True):
            expected = model(input_ids=tokens, use_cache=False).logits
            length, scale = 8 * LAYERS * SMALL["intermediate_size"], float(expected.abs().max())
            torch.testing.assert_close(result.double(), expected, **tolerance(dtype, length, scale))
    assert len(backend.reports) == 1 and found()["attention"] == LAYERS


def test_layers_are_named():
    model = model_of("llama", "sdpa", torch.float32)
    with torch.no_grad():
        torch.compile(model, backend="gcu", options={"inductor": False})(torch.randint(2, 272, (1, 5)), use_cache=False)
    places = [m.layer for report in backend.reports for m in report.matches if m.rule == "attention"]
    assert [place.split(".")[-2:] for place in places] == [["0", "self_attn"], ["1", "self_attn"]]


@pytest.mark.slow
def test_smollm2_fuses_all_thirty_layers():
    from gcu_compile.demo_model import ensure_demo_model

    model = transformers.AutoModelForCausalLM.from_pretrained(ensure_demo_model(), dtype=torch.float32).eval()
    tokens = torch.randint(2, 1000, (1, 17))
    with torch.no_grad():
        actual = torch.compile(model, backend="gcu", options={"inductor": False})(tokens, use_cache=False).logits
        expected = model.double()(tokens, use_cache=False).logits
    fused = found()
    assert (fused["attention"], fused["rms_norm"], fused["rotary"], fused["gated_activation"]) == (30, 61, 60, 30)
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, **tolerance(torch.float32, 8 * 30 * 1536, scale))
