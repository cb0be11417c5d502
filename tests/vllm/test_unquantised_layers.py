"""Unquantised layers of bfloat16 on `gcu::linear`: what becomes of weights, and a model that answers."""

import layers
import pytest
import torch
from engine import SMALL, run
from tiny import LLAMA, save_llama

from gcu_compile.kernels.tolerance import tolerance

pytestmark = pytest.mark.vllm
K, N = 96, 200


@pytest.fixture
def installed(monkeypatch):
    """vLLM chooses products through ours, whatever this CPU is."""
    from vllm.model_executor.layers import utils

    from vllm_integration import linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)  # put back later
    monkeypatch.setenv("GCU_COMPILE_LINEAR", "gcu")
    linear.install()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(found, x, weight, bias=None):
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, **tolerance(torch.bfloat16, K, K**0.5))


@pytest.mark.parametrize("bias", [False, True])
def test_a_layers_weight_is_packed_in_its_place(installed, bias):
    from vllm.model_executor.layers.linear import ReplicatedLinear

    with layers.shard():
        layer = ReplicatedLinear(K, N, bias=bias, params_dtype=torch.bfloat16)
    weight, more = randn(N, K), randn(N, seed=1) if bias else None
    layer.weight.data.copy_(weight)
    if bias:
        layer.bias.data.copy_(more)
    layers.ready(layer)
    assert layer.weight.dim() == 4 and not layer.weight.requires_grad
    for rows in (1, 7, 40):
        x = randn(rows, K, seed=2)
        close(layer(x)[0], x, weight, more)


@pytest.mark.parametrize(("n", "dtype"), [(N, torch.float32), (N, torch.float16), (8, torch.bfloat16)])
def test_other_layers_are_left_to_vllm(installed, n, dtype):
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_integration import linear

    with layers.shard():
        layer = ReplicatedLinear(K, n, bias=False, params_dtype=dtype)
    assert not linear.prepare(layer, True)
    assert layer.weight.dim() == 2


def test_a_head_keeps_its_rows_and_an_embedding_is_packed_when_it_is_multiplied_with(installed, monkeypatch):
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    from vllm_integration import linear

    packed = []
    monkeypatch.setattr(linear, "pack", lambda weight, make=linear.pack: (packed.append(1), make(weight))[1])
    for kind, at_once in ((ParallelLMHead, 1), (VocabParallelEmbedding, 0)):
        packed.clear()
        with layers.shard():
            layer = kind(256, K, params_dtype=torch.bfloat16)
        layer.weight.data.copy_(randn(256, K))
        layers.ready(layer)
        assert len(packed) == at_once and torch.equal(layer.weight.data, randn(256, K))
        for _ in range(2):
            close(layers.apply(layer, randn(3, K, seed=2)), randn(3, K, seed=2), randn(256, K))
        assert len(packed) == 1


@pytest.mark.parametrize(
    ("said", "fastest", "ours"),
    [("auto", True, True), ("auto", False, False), ("gcu", False, True), ("vllm", True, False)],
)
def test_the_option_decides_at_each_layer(installed, said, fastest, ours, monkeypatch):
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_integration import linear

    monkeypatch.setattr(linear, "is_fastest", lambda: fastest)
    monkeypatch.setenv("GCU_COMPILE_LINEAR", said)  # which was `gcu` when vLLM's choice was replaced
    with layers.shard():
        layer = layers.ready(ReplicatedLinear(K, N, bias=False, params_dtype=torch.bfloat16))
    assert (layer.weight.dim() == 4) is ours


@pytest.mark.parametrize("trouble", ["no compiler", "no such instruction set"])
def test_a_kernel_that_cannot_be_built_leaves_layers_to_vllm_and_says_so_once(trouble, monkeypatch, caplog, tmp_path):
    from vllm_integration import linear

    linear._warn.cache_clear()
    monkeypatch.setattr(linear.log, "propagate", True)
    monkeypatch.setenv("GCU_COMPILE_LINEAR", "gcu")
    if trouble == "no compiler":
        monkeypatch.setenv("CXX", "/bin/false")
        monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path))
    else:
        monkeypatch.setattr("gcu_compile.kernels.host.build.available", lambda: ("portable",))
        monkeypatch.setenv("GCU_COMPILE_HOST_ISA", "amx")
    assert not linear.are_ours() and not linear.are_ours()
    assert caplog.text.count("Unquantised layers are vLLM's, though option linear is 'gcu'") == 1


def test_what_the_option_came_to_is_part_of_every_graph(monkeypatch):
    from types import SimpleNamespace

    from vllm.v1.worker.cpu_worker import CPUWorker

    from vllm_integration import worker

    keys = []
    monkeypatch.setattr(CPUWorker, "load_model", lambda self: keys.append(self.vllm_config.additional_config))
    for ours in (True, False):
        monkeypatch.setattr(worker.linear, "are_ours", lambda ours=ours: ours)
        one = object.__new__(worker.GcuHostWorker)
        one.vllm_config = SimpleNamespace(additional_config={"a": 1})
        one.load_model()
    assert keys[0] != keys[1] and all(key["a"] == 1 for key in keys)


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """An engine's reply, and the log-probabilities of its prompts' tokens by transformers, in float32 and bfloat16."""
    from transformers import AutoModelForCausalLM

    changes = {"eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
    folder = save_llama(tmp_path_factory.mktemp("llama"), **changes)
    prompts = [randint(size) for size in (1, 2, 13, 40)]
    request = {
        "llm": {"model": str(folder), **SMALL, "dtype": "bfloat16"},
        "prompts": prompts,
        "sampling": {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "detokenize": False, "prompt_logprobs": 0},
    }
    reply = run(tmp_path_factory.mktemp("run"), request, GCU_COMPILE_LINEAR="gcu")
    assert "error" not in reply, reply["error"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rounded = torch.cat([of_tokens(model, ids) for ids in prompts])
    return reply, torch.cat([of_tokens(model.float(), ids) for ids in prompts]), rounded


def randint(size):
    return torch.randint(2, LLAMA["vocab_size"], (size,), generator=torch.Generator().manual_seed(size)).tolist()


def of_tokens(model, ids):
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:], dtype=torch.int64).unsqueeze(1)).flatten()


def test_a_model_answers_as_exactly_as_transformers_in_bfloat16(answer):
    reply, exact, rounded = answer
    found = torch.tensor([value for one in reply["prompt_logprobs"] for value in one])
    ours, theirs = ((one - exact).abs().mean() for one in (found, rounded))
    assert ours <= 1.25 * theirs, (ours, theirs)


def test_every_product_of_it_is_ours(answer):
    (calls,) = answer[0]["calls"]
    steps = calls["paged_attention/host_cpp"] // LLAMA["num_hidden_layers"]
    assert calls["linear/host_cpp"] >= steps * (4 * LLAMA["num_hidden_layers"] + 1) > 0
    assert "linear/eager" not in calls
