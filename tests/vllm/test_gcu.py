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


def test_slots_are_those_of_the_block_table():
    from vllm_integration.slots import PAD_SLOT, slot_mapping

    table = torch.tensor([[7, 3, 0], [1, 9, 4], [5, 5, 5]], dtype=torch.int32)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    positions = torch.tensor([3, 4, 0, 7, 8, 99, 99])  # two of padding
    out = torch.zeros(9, dtype=torch.int64)
    slot_mapping(table, starts, positions, 4, out)
    assert out.tolist() == [7 * 4 + 3, 3 * 4, 1 * 4, 9 * 4 + 3, 4 * 4] + [PAD_SLOT] * 4
