"""Rule `rope_and_cache` in compiled engines: rotation and write are one call, and replies are transformers' own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from random_models import CHUNKED, GQA, GREEDY, LIMITS, SIZES, expected, far, prompts, save
from several import run
from tiny import save_llama

pytestmark = pytest.mark.vllm
PARTIAL = {**SIZES, "intermediate_size": 192, "max_position_embeddings": 256, "rotary_pct": 0.5}
MODELS = {
    "llama": ("LlamaConfig", GQA),
    "norm of q and k": ("Qwen3Config", {**GQA, "head_dim": 32}),
    "window, soft cap": (
        "Gemma2Config",
        {**GQA, "head_dim": 32, "sliding_window": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    ),
    "partial, bias": ("GPTNeoXConfig", PARTIAL),
    "partial, interleaved": ("GlmConfig", {**GQA, "head_dim": 32, "partial_rotary_factor": 0.5}),
    "norm of all heads together": ("Olmo2Config", GQA),
}
# What the rule leaves: the write stays an operation of its own. vLLM 0.32 serves GPT-NeoX and GLM through the models
# of transformers, which spell the rotation in another way.
LEFT = {"norm of all heads together", "partial, bias", "partial, interleaved"}
ASKED = [("norm of q and k", "auto"), ("norm of all heads together", "auto"), ("llama", "int8")]
LONG = [(name, "auto") for name in MODELS if (name, "auto") not in ASKED]  # each is an engine that compiles
ON = {"GCU_COMPILE_ENABLE_RULES": "rope_and_cache", "GCU_COMPILE_ATTENTION": "gcu"}


@pytest.fixture(scope="module")
def asked(request):
    """(model, KV dtype) in the order of the engines."""
    return ASKED + (LONG if request.config.getoption("--slow") else [])


@pytest.fixture(scope="module")
def replies(tmp_path_factory, asked):
    """(model, KV dtype) -> reply. Prompts are cut into chunks of 24 tokens, and their first blocks are shared."""
    folder = tmp_path_factory.mktemp("models")
    models = {name: save(folder / str(i), *MODELS[name]) for i, name in enumerate({name: 0 for name, _ in asked})}
    requests = [
        {
            "llm": {**CHUNKED, "model": str(models[name]), "kv_cache_dtype": kind},
            "prompts": prompts(),
            "sampling": GREEDY,
        }
        for name, kind in asked
    ]
    found = run(folder / "run", requests, 1800, VLLM_ENABLE_V1_MULTIPROCESSING="0", **ON)
    return dict(zip(asked, found, strict=True)) | {name: expected(model) for name, model in models.items()}


@pytest.mark.parametrize(("model", "kind"), [*ASKED, *(pytest.param(*one, marks=pytest.mark.slow) for one in LONG)])
def test_replies_equal_transformers(replies, model, kind):
    if kind == "auto":
        assert replies[model, kind]["tokens"] == replies[model]["tokens"]
    assert far(replies[model, kind]["logprobs"], replies[model]["logprobs"]) < LIMITS[kind]


def test_one_call_rotates_and_writes(replies, asked):
    """The counters are the process's: what a model adds to those of the models before it."""
    before = {}
    for name, kind in asked:
        worker = replies[name, kind]["worker"]
        assert worker["fallbacks"] == []
        gained = {op: worker["calls"].get(f"{op}/host_cpp", 0) - before.get(f"{op}/host_cpp", 0) for op in
                  ("rope_and_cache", "write_kv", "paged_attention")}  # fmt: skip
        before = worker["calls"]
        writer, other = ("write_kv", "rope_and_cache") if name in LEFT else ("rope_and_cache", "write_kv")
        assert gained[other] == 0 and gained[writer] >= gained["paged_attention"] > 0, (name, gained)


def test_explain_counts_a_place_in_every_layer(tmp_path):
    """Layers between two attentions share code, though each has a name of its own; the shadow check finds no breach."""
    model = save_llama(tmp_path / "model", num_hidden_layers=4, eos_token_id=None, pad_token_id=None)
    environ = {
        **os.environ,
        **ON,
        "GCU_COMPILE_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "GCU_COMPILE_SHADOW": "float64",
    }
    words = [sys.executable, "-m", "gcu_compile.cli.main", "explain", str(model), "--through", "vllm", "--json"]
    done = subprocess.run(
        [*words, str(tmp_path / "report.json")], capture_output=True, text=True, env=environ, timeout=400
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fused"]["rope_and_cache"] == 4 and "rotary" not in report["fused"]
    assert [graph["state"] for graph in report["cache"]] == ["miss", "miss", "hit", "hit", "miss"]
    (row,) = [line.split("│") for line in done.stderr.splitlines() if "gcu::rope_and_cache" in line]
    assert (row[4].strip(), int(row[6])) == ("4", 0)  # places, breaches


def test_without_cache_or_slots_queries_are_rotated_and_nothing_is_written(monkeypatch):
    """A profiling run. Slots of a dummy run may be there before the cache is."""
    from types import SimpleNamespace

    from gcu_compile.kernels.attention import rope
    from vllm_integration import cache_write

    qkv, table, positions = torch.randn(5, 6 * 16), torch.randn(9, 16), torch.tensor([0, 8, 1, 2, 2])
    norm, slots = torch.rand(16), torch.arange(5)
    caches = [torch.zeros(1, 1, 16, 16) for _ in "kv"]
    given = {"q_norm": norm, "interleaved": True, "eps": 1e-5}
    wanted = rope.eager(qkv, table, positions, slots, *caches, **given)
    layer = SimpleNamespace(impl=None)
    for context in ((None, layer, torch.zeros(1, 1), None), (None, layer, torch.tensor([]), slots)):
        monkeypatch.setattr(cache_write, "get_attention_context", lambda name, context=context: context)
        q, token = cache_write.rope_and_cache(qkv, table, positions, norm, None, 4, 16, True, 1e-5, "layer")
        torch.testing.assert_close(q, wanted)
        assert token.numel() == 0


def test_only_compiled_decoders_with_the_rule_write_apart(monkeypatch):
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config

    from vllm_integration import compilation

    def apart(
        attn_type="decoder", mode=CompilationMode.VLLM_COMPILE, splitting=("vllm::unified_attention_with_output",)
    ):
        config = VllmConfig()
        config.compilation_config = CompilationConfig(mode=mode, splitting_ops=list(splitting))
        with set_current_vllm_config(config):
            return compilation.writes_apart(attn_type)

    assert not apart()
    monkeypatch.setenv("GCU_COMPILE_ENABLE_RULES", "rope_and_cache")
    assert apart() and apart(splitting=())
    assert not apart("encoder_only") and not apart("encoder_decoder")
    assert not apart(mode=CompilationMode.NONE)
    assert not apart(splitting=("vllm::unified_attention_with_output", compilation.CACHE_UPDATE))
    monkeypatch.setenv("GCU_COMPILE_DISABLE_RULES", "rope_and_cache")
    assert not apart()
