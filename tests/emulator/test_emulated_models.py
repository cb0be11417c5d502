"""Tiny models on the emulated card: eager bit for bit as on the CPU, compiled within the tolerance table."""

import pytest
import torch
from emulated import on_card

from gcu_compile.kernels.tolerance import tolerance

SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DENSE = {**SMALL, "intermediate_size": 96}
MODELS = {
    "Llama": {**DENSE, "num_key_value_heads": 2},
    "Qwen2": {**DENSE, "num_key_value_heads": 2},
    "Mixtral": {**DENSE, "num_key_value_heads": 2, "num_local_experts": 4},
    "GPTNeoX": DENSE,
    "Bloom": {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Gemma2": {**DENSE, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4},
    "Mistral": {**DENSE, "num_key_value_heads": 2, "sliding_window": 4},
    "Phi3": {**DENSE, "num_key_value_heads": 2, "pad_token_id": 0},
}


def build(name):
    """A random model of an architecture, on the CPU."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    # The fast experts count tokens with an integer histogram, which the CPU lacks and a card has.
    config._attn_implementation = config._experts_implementation = "eager"
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@on_card
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_cpus(name):
    model = build(name)
    ids = torch.randint(0, 97, (2, 11))
    with torch.no_grad():
        expected = model(ids).logits
        got = model.to("gcu")(ids.to("gcu")).logits
    assert got.device.type == "gcu"
    assert torch.equal(got.cpu(), expected)


@on_card
def test_generation_with_a_cache_equals_the_cpus():
    model = build("Llama")
    ids = torch.randint(0, 97, (2, 7))
    expected = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
    got = model.to("gcu").generate(ids.to("gcu"), do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert torch.equal(got.cpu(), expected)


@on_card
def test_a_training_step_equals_the_cpus():
    ids = torch.randint(0, 97, (2, 11))
    weights = []
    for device in ("cpu", "gcu"):
        model = build("Llama").to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        model(ids.to(device), labels=ids.to(device)).loss.backward()
        optimizer.step()
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert all(torch.equal(card, cpu) for cpu, card in zip(*weights, strict=True))


@on_card
def test_a_compiled_model_agrees_with_float64():
    model = build("Llama")
    ids = torch.randint(0, 97, (2, 11))
    with torch.no_grad():
        expected = build("Llama").double()(ids).logits
        compiled = torch.compile(model.to("gcu"), backend="gcu")
        got = compiled(ids.to("gcu")).logits.cpu()
    # A logit is a sum over 64 products of values that two layers have rounded.
    bounds = tolerance(torch.float32, 64 * 2 * 4, scale=float(expected.abs().max()))
    torch.testing.assert_close(got.double(), expected, **bounds)
