"""vLLM on the emulated card, through the platform's device branch, answers as transformers does on the CPU."""

import pytest
import torch
from engine import SMALL, run
from tiny import save_llama

pytestmark = pytest.mark.vllm
TOKENS = 12
PROMPTS = [[5, 9, 33, 7], list(range(20, 60)), [2], list(range(200, 110, -1))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), eos_token_id=None, pad_token_id=None)


@pytest.fixture(scope="module")
def expected(model):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    result = []
    for prompt in PROMPTS:
        out = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS)
        result.append(out[0, len(prompt) :].tolist())
    return result


def on_card(folder, model, **llm):
    """The reply of vLLM on an emulated gcu300 with 1 GiB."""
    # Small steps: kernels run in Triton's interpreter, and vLLM profiles the largest step at its start.
    llm = {"max_num_batched_tokens": 64, "max_num_seqs": 4, **llm}
    folder.mkdir(exist_ok=True)
    (folder / "card.yaml").write_text("dram_bytes: 1073741824\n")
    request = {
        "llm": {"model": str(model), **SMALL, **llm},
        "prompts": PROMPTS,
        "sampling": {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False},
        "probe": True,
    }
    return run(folder, request, GCU_COMPILE_EMULATE="gcu300", GCU_COMPILE_TARGET_PROFILE=str(folder / "card.yaml"))


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_greedy_tokens_on_the_card_equal_transformers(tmp_path, model, expected, eager):
    reply = on_card(tmp_path, model, enforce_eager=eager)
    assert reply.get("tokens") == expected, reply["log"][-3000:]
    (worker,) = reply["workers"]
    assert worker["platform"] == "GcuPlatform"
    assert worker["start_method"] == "spawn" and not worker["async_scheduling"]
    if not eager:
        assert worker["compile_backend"] == "vllm_integration.compiler.GcuCompiler"
    assert "Traceback" not in reply["log"].split("Chat template warmup failed")[0]


@pytest.mark.slow
def test_two_cards_with_gloo_answer_as_one(tmp_path, model, expected):
    """Tensor parallel: each worker on a card of its own, sums and gathers by gloo on the cards' memory."""
    reply = on_card(tmp_path, model, enforce_eager=True, tensor_parallel_size=2)
    assert reply.get("tokens") == expected, reply["log"][-3000:]
    assert [worker["device"] for worker in reply["workers"]] == ["gcu:0", "gcu:1"]
    assert {worker["communicator"] for worker in reply["workers"]} == {"EmulatedCommunicator"}
    assert len({worker["pid"] for worker in reply["workers"]}) == 2


@pytest.mark.slow
def test_an_fp8_cache_is_read_and_written_as_int8(tmp_path, model):
    """On gcu300 the cache is int8; greedy tokens are those of a run that asks for int8."""
    asked = [on_card(tmp_path / name, model, enforce_eager=True, kv_cache_dtype=name) for name in ("fp8", "int8")]
    first, second = (reply.get("tokens") for reply in asked)
    assert first is not None and first == second, asked[0]["log"][-3000:]
    assert "gcu300 has no fp8" in asked[0]["log"]


def test_slots_are_those_of_the_block_table():
    from vllm_integration.slots import PAD_SLOT, slot_mapping

    table = torch.tensor([[7, 3, 0], [1, 9, 4], [5, 5, 5]], dtype=torch.int32)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    positions = torch.tensor([3, 4, 0, 7, 8, 99, 99])  # two of padding
    out = torch.zeros(9, dtype=torch.int64)
    slot_mapping(table, starts, positions, 4, out)
    assert out.tolist() == [7 * 4 + 3, 3 * 4, 1 * 4, 9 * 4 + 3, 4 * 4] + [PAD_SLOT] * 4
