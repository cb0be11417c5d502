"""Every family of language models of the vendor's release notes, compiled, says what transformers says."""

import pytest
from families import FAMILIES
from random_models import CHUNKED, GREEDY, LIMITS, far, prompts
from several import run

pytestmark = pytest.mark.vllm
SAMPLE = ("Qwen v1",)  # 40 s; each further one costs half a minute, a third of it to look at vLLM's class
# One process each.
GROUPS = {
    "ours": ("Baichuan 7B", "Baichuan2 7B", "Baichuan2 13B", "InternLM v1", "Aquila"),
    "rotary embeddings": (
        "Llama 3.1 (llama3 rope scaling)", "Llama (linear rope scaling)", "Llama (yarn)", "Yi 200K (rope theta)",
        "Mistral", "Qwen2",
    ),
    "gpt": ("GPT-J", "GPT-NeoX", "StarCoder (GPTBigCode)", "StarCoder2", "OPT", "Bloom"),
    "others": ("Gemma", "Gemma 2", "Phi-3", "GLM-4 (hf)"),
    "own layouts": ("ChatGLM3", "GLM-4 (THUDM)", "InternLM2", "InternLM2 (dynamic rope scaling)", "Orion"),
    "mixtures": ("Mixtral", "Qwen2-MoE", "DBRX", "DeepSeek-V2", "DeepSeek-MoE"),
}  # fmt: skip


def check(names, folder):
    """Greedy tokens and log-probabilities of the prompts, each family in an engine of its own, in one process."""
    requests, expected = [], {}
    for i, name in enumerate(names):
        model = folder / str(i)
        expected[name] = FAMILIES[name].write(model)
        llm = {**CHUNKED, "model": str(model), "trust_remote_code": FAMILIES[name].remote}
        requests.append({"llm": llm, "prompts": prompts(), "sampling": GREEDY})
    environ = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_MODULES_CACHE": str(folder / "modules")}
    replies = run(folder / "run", requests, timeout=1500, **environ)
    for name, reply in zip(names, replies, strict=True):
        assert far(reply["logprobs"], expected[name]["logprobs"]) < LIMITS["auto"], name
        assert reply["tokens"] == expected[name]["tokens"], name
        assert reply["worker"]["fallbacks"] == [], name
        attention = "mla_attention" if name == "DeepSeek-V2" else "paged_attention"
        assert reply["ran"][f"{attention}/host_cpp"] > 0, name


def test_a_sample_of_families(tmp_path):
    check(SAMPLE, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("group", GROUPS)
def test_families(group, tmp_path):
    check(GROUPS[group], tmp_path)


def test_no_family_is_left_out():
    assert sorted([*SAMPLE, *sum(GROUPS.values(), ())]) == sorted(FAMILIES)
