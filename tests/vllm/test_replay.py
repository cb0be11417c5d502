"""Steps that are replayed write the same tokens, of the same log-probabilities, as steps that go through Python."""

import pytest
import quantised
from random_models import CHUNKED, GQA, TOKENS, prompts, save
from several import run

pytestmark = pytest.mark.vllm
SAMPLING = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False, "logprobs": 0}
ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "GCU_COMPILE_ATTENTION": "gcu"}
GEMMA = {**GQA, "head_dim": 32, "sliding_window": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32}
# name -> a model, what its engine is told, its environment, and a call that must be among those that are replayed.
MODELS = {
    "products of torch": (("LlamaConfig", GQA), {"dtype": "float32"}, {}, "torch.ops._C.onednn_mm.default"),
    "two groups of layers, int8 cache": (
        ("Gemma2Config", GEMMA),
        {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
        {"GCU_COMPILE_LINEAR": "gcu"},
        "gcu_linear",
    ),
    "GPTQ": (quantised.Form("gptq"), {"dtype": "bfloat16"}, {}, "gcu_dequant_gemm"),
    "w8a8": (quantised.Form("compressed", 8, None, activations="dynamic"), {"dtype": "bfloat16"}, {}, "gcu_int8_gemm"),
}


@pytest.fixture(scope="module")
def replies(tmp_path_factory):
    """name -> replies with replay and without. Every prompt is asked several times, so that batches come back."""
    folder = tmp_path_factory.mktemp("models")
    plain = save(folder / "plain", "LlamaConfig", GQA)
    requests = []
    for i, (what, llm, environ, _) in enumerate(MODELS.values()):
        if isinstance(what, quantised.Form):
            model = quantised.save(what, plain, folder / str(i))
        else:
            model = save(folder / str(i), *what)
        for replay in ("1", "0"):
            requests.append(
                {
                    "llm": {**CHUNKED, **llm, "model": str(model)},
                    "prompts": prompts(),
                    "sampling": SAMPLING,
                    "rounds": 3,
                    "environ": {**environ, "GCU_COMPILE_REPLAY": replay},
                }
            )
    found = run(folder / "run", requests, timeout=900, **ENGINE)
    return dict(zip(MODELS, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_replayed_steps_write_what_others_write(replies, name):
    with_replay, without = replies[name]
    assert with_replay["worker"]["replayed"] > TOKENS
    assert without["worker"]["replayed"] is None
    assert with_replay["tokens"] == without["tokens"]
    assert with_replay["written"] == without["written"] != []


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replayed(replies, name):
    captured = replies[name][0]["worker"]["captured"]
    assert {MODELS[name][3], "gcu_attention", "gcu_rope_and_cache"} <= set(captured)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_kernels_ran(replies, name):
    """What says which implementation ran counts replayed steps too."""
    counted, expected = (one["ran"] for one in replies[name])
    assert counted == expected
