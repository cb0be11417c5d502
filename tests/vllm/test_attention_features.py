"""What vLLM does with attention beyond plain decoders, through our backend: images with M-RoPE, encoders, sinks, the
verification of drafts, another backend by the user's word. Transformers' eager attention is the reference."""

import pytest
from other_models import (
    ENCODERS,
    IMAGE,
    START,
    VISION_END,
    VISION_START,
    encoder_says,
    qwen2_vl_says,
    save_encoder,
    save_qwen2_vl,
    save_whisper,
    whisper_says,
)
from random_models import GQA, LATENT, TOKENS, declare_int8_cache, expected, far, prompts, save
from several import run

pytestmark = pytest.mark.vllm
LLM = {
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "dtype": "float32",
    "block_size": 16,
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
}
SAMPLING = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "GCU_COMPILE_ATTENTION": "gcu"}


def ran(reply, *ops):
    assert reply["worker"]["fallbacks"] == []
    for op in ops:
        assert reply["worker"]["calls"].get(f"{op}/host_cpp", 0) > 0, op


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """One engine: text alone, text around an image, an image at the start."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    model = save_qwen2_vl(folder / "model")
    ids = [[token % 250 for token in one] for one in prompts()]  # no token that stands for an image
    one = [VISION_START, IMAGE, VISION_END]
    asked = [[ids[2], None], [ids[1] + one + ids[2], [2, 3]], [[5, *one, 7], [3, 2]]]
    llm = {**LLM, "model": str(model), "skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    request = {"llm": llm, "prompts": asked, "sampling": {**SAMPLING, "prompt_logprobs": 0}}
    (reply,) = run(folder / "run", [request], **ENGINE)
    return reply, qwen2_vl_says(model, asked)


@pytest.mark.slow
def test_m_rope_with_and_without_an_image(images):
    reply, theirs = images
    assert reply["tokens"] == theirs["tokens"]
    assert far(reply["logprobs"], theirs["logprobs"]) < 1e-4
    ran(reply, "paged_attention", "write_kv", "attention")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_embed_as_transformers(name, tmp_path):
    model = save_encoder(tmp_path / "model", *ENCODERS[name])
    llm = {**LLM, "model": str(model), "runner": "pooling", "skip_tokenizer_init": False}
    (reply,) = run(tmp_path / "run", [{"llm": llm, "prompts": prompts()}], **ENGINE)
    assert far(reply["embeddings"], encoder_says(model, prompts())) < 1e-4
    ran(reply, "attention")


@pytest.mark.slow
def test_encoder_and_decoder(tmp_path):
    """Whisper: bidirectional, causal, and cross attention to a cache of what was heard."""
    model = save_whisper(tmp_path / "model")
    asked = [[[START, 5, 6], 1.0], [[START], 0.5]]
    llm = {**LLM, "model": str(model), "skip_tokenizer_init": False, "max_model_len": 64}
    (reply,) = run(tmp_path / "run", [{"llm": llm, "prompts": asked, "sampling": SAMPLING}], **ENGINE)
    assert reply["tokens"] == whisper_says(model, asked)
    ran(reply, "paged_attention", "write_kv", "attention")


@pytest.mark.slow
def test_sinks(tmp_path):
    """GPT-OSS: sinks, and a window in every second layer."""
    sizes = {**GQA, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    model = save(tmp_path / "model", "GptOssConfig", sizes)
    sampling = {**SAMPLING, "prompt_logprobs": 0}
    request = {"llm": {**LLM, "model": str(model)}, "prompts": prompts(), "sampling": sampling}
    (reply,) = run(tmp_path / "run", [request], **ENGINE)
    theirs = expected(model)
    assert reply["tokens"] == theirs["tokens"]
    assert far(reply["logprobs"], theirs["logprobs"]) < 1e-4
    ran(reply, "paged_attention", "write_kv")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings", "op"), [("LlamaConfig", GQA, "paged_attention"),
                                                     ("DeepseekV2Config", LATENT, "mla_attention")])  # fmt: skip
def test_drafts_are_verified_as_greedy_decoding(kind, settings, op, tmp_path):
    """Several tokens of a sequence in one step. A process of its own each: vLLM's n-gram proposer imports modules that
    the next engine of the process stumbles over."""
    model = save(tmp_path / "model", kind, settings)
    repeating = [[*one, *one[:6]] for one in prompts() if len(one) > 6]  # so that there are drafts
    llm = {**LLM, "model": str(model), "speculative_config": DRAFTS}
    (reply,) = run(tmp_path / "run", [{"llm": llm, "prompts": repeating, "sampling": SAMPLING}], **ENGINE)
    assert reply["tokens"] == expected(model, repeating)["tokens"]
    ran(reply, op, "write_kv")


@pytest.mark.slow
def test_latent_attention_switched_off(tmp_path):
    """`VLLM_MLA_DISABLE=1`, the way for vLLM 0.26: keys and values are made of the latents, and cached."""
    model = save(tmp_path / "model", "DeepseekV2Config", LATENT)
    sampling = {**SAMPLING, "prompt_logprobs": 0}
    request = {"llm": {**LLM, "model": str(model)}, "prompts": prompts(), "sampling": sampling}
    (reply,) = run(tmp_path / "run", [request], **ENGINE, VLLM_MLA_DISABLE="1")
    theirs = expected(model)
    assert reply["tokens"] == theirs["tokens"]
    assert far(reply["logprobs"], theirs["logprobs"]) < 1e-4
    ran(reply, "paged_attention", "write_kv")


@pytest.mark.slow
def test_vllm_own_backend_by_name(tmp_path):
    """`--attention-backend CPU_ATTN`, against option `attention`, which asks for ours; the choice is in the log."""
    model = save(tmp_path / "model", "LlamaConfig", GQA)
    llm = {**LLM, "model": str(model), "attention_backend": "CPU_ATTN", "block_size": 32}
    (reply,) = run(tmp_path / "run", [{"llm": llm, "prompts": prompts(), "sampling": SAMPLING}], **ENGINE)
    assert reply["tokens"] == expected(model)["tokens"]
    assert not any(call.startswith("paged_attention") for call in reply["worker"]["calls"])
    assert "Attention: CPUAttentionBackend (attention backend CPU_ATTN is asked for)." in reply["log"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_int8_cache_with_the_scales_of_the_checkpoint(strategy, tmp_path):
    """The checkpoint declares the cache; its scales come from a calibration, not from the tokens of the step."""
    model = save(tmp_path / "model", "LlamaConfig", GQA)
    theirs = expected(model)
    declare_int8_cache(model, strategy)
    sampling = {**SAMPLING, "prompt_logprobs": 0}
    request = {"llm": {**LLM, "model": str(model)}, "prompts": prompts(), "sampling": sampling}
    (reply,) = run(tmp_path / "run", [request], **ENGINE)
    assert 1e-3 < far(reply["logprobs"], theirs["logprobs"]) < 0.25  # the rounding of a cache, no more and no less
    ran(reply, "paged_attention", "write_kv")
