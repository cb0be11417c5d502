"""Our attention backend in a running engine: models of each kind of attention say what transformers' eager says."""

import pytest
from random_models import CHUNKED, GQA, GREEDY, LATENT, LIMITS, SIZES, expected, far, prompts, save
from several import run

pytestmark = pytest.mark.vllm
MODELS = {
    "full attention": ("LlamaConfig", GQA),
    "sliding window": ("MistralConfig", {**GQA, "sliding_window": 16}),
    "soft cap, window in every second layer": (
        "Gemma2Config",
        {**GQA, "head_dim": 32, "sliding_window": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    ),
    "ALiBi": ("BloomConfig", {**SIZES, "n_head": 4, "n_layer": 2}),
    "norm of q and k": ("Qwen3Config", {**GQA, "head_dim": 32}),
    "latent attention": ("DeepseekV2Config", LATENT),
}
ASKED = [*((name, "auto") for name in MODELS), ("full attention", "int8"), ("sliding window", "int8")]


@pytest.fixture(scope="module")
def replies(tmp_path_factory):
    """(model, KV dtype) -> reply. Prompts are cut into chunks of 24 tokens, and their first blocks are shared."""
    folder = tmp_path_factory.mktemp("models")
    models = {name: save(folder / str(i), *what) for i, (name, what) in enumerate(MODELS.items())}
    llm = {**CHUNKED, "enforce_eager": True}
    requests = [
        {"llm": {**llm, "model": str(models[name]), "kv_cache_dtype": kind}, "prompts": prompts(), "sampling": GREEDY}
        for name, kind in ASKED
    ]
    found = run(folder / "run", requests, VLLM_ENABLE_V1_MULTIPROCESSING="0", GCU_COMPILE_ATTENTION="gcu")
    found = dict(zip(ASKED, found, strict=True))
    return found | {name: expected(model) for name, model in models.items()}


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_equal_transformers(replies, model):
    assert replies[model, "auto"]["tokens"] == replies[model]["tokens"]


@pytest.mark.parametrize(("model", "kind"), ASKED)
def test_log_probabilities_equal_transformers(replies, model, kind):
    assert far(replies[model, kind]["logprobs"], replies[model]["logprobs"]) < LIMITS[kind]


@pytest.mark.parametrize(("model", "kind"), ASKED)
def test_our_kernels_ran(replies, model, kind):
    worker = replies[model, kind]["worker"]
    assert worker["fallbacks"] == []
    for op in ("mla_attention" if model == "latent attention" else "paged_attention", "write_kv"):
        assert worker["calls"][f"{op}/host_cpp"] > 0
