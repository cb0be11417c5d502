"""What the platform of a card makes of vLLM's configuration: block size, caches, graphs, collectives, visible cards."""

import json
import os
import subprocess
import sys

import pytest
from tiny import save_llama

pytestmark = pytest.mark.vllm
SCRIPT = """
import json, sys
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform as p

def made(**given):
    config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=128, **given).create_engine_config()
    cache, compilation = config.cache_config, config.compilation_config
    return {
        "block_size": cache.block_size, "cache_dtype": cache.cache_dtype, "mode": compilation.cudagraph_mode.name,
        "worker": config.parallel_config.worker_cls,
        "custom_all_reduce": not config.parallel_config.disable_custom_all_reduce,
    }

def refused(**given):
    try:
        made(**given)
    except Exception as error:
        return str(error)

found = {
    "plain": made(), "fp8": made(kv_cache_dtype="fp8"), "int8": made(kv_cache_dtype="int8", block_size=32),
    "graphs": refused(compilation_config={"cudagraph_mode": "FULL"}),
    "platform": [p.device_type, p.dist_backend, p.device_control_env_var, p.is_cuda_alike(), p.supports_fp8()],
    "communicator": p.get_device_communicator_cls(),
    "cards": torch.gcu.device_count(), "total": p.get_device_total_memory(), "free": torch.gcu.mem_get_info()[0],
    "used": p.get_current_memory_usage(),
}
print("FOUND" + json.dumps(found))
"""


def configured(folder, model, target, **environ):
    """(what the script found, what was logged)"""
    (folder / "card.yaml").write_text("dram_bytes: 1073741824\n")
    env = {**os.environ, "GCU_COMPILE_EMULATE": target, "GCU_COMPILE_TARGET_PROFILE": str(folder / "card.yaml")}
    command = [sys.executable, "-c", SCRIPT, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, env={**env, **environ}, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    found = next(line for line in result.stdout.splitlines() if line.startswith("FOUND"))
    return json.loads(found.removeprefix("FOUND")), result.stdout + result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), eos_token_id=None, pad_token_id=None)


@pytest.fixture(scope="module")
def gcu300(model, tmp_path_factory):
    return configured(tmp_path_factory.mktemp("gcu300"), model, "gcu300", TOPS_VISIBLE_DEVICES="1")


def test_blocks_have_64_tokens_unless_the_user_says_otherwise(gcu300):
    assert gcu300[0]["plain"]["block_size"] == 64
    assert gcu300[0]["int8"]["block_size"] == 32


def test_an_fp8_cache_is_int8_and_the_log_says_so(gcu300):
    found, log = gcu300
    assert found["plain"]["cache_dtype"] == "auto"
    assert found["fp8"]["cache_dtype"] == found["int8"]["cache_dtype"] == "int8_per_token_head"
    assert log.count("gcu300 has no fp8: the KV cache is int8, a scale per token and head, instead of fp8") == 1


def test_graphs_are_refused_where_they_were_asked_for_and_left_out_elsewhere(gcu300):
    found, log = gcu300
    assert found["plain"]["mode"] == "NONE"
    assert "captures no graphs" in found["graphs"] and "cudagraph_mode" in found["graphs"]


def test_the_device_branch_is_taken(gcu300):
    found, _ = gcu300
    assert found["platform"] == ["gcu", "gloo", "TOPS_VISIBLE_DEVICES", False, False]
    assert found["plain"]["worker"] == "vllm_integration.gcu_worker.GcuWorker"
    assert found["plain"]["custom_all_reduce"] is False
    assert found["communicator"] == "vllm_integration.gcu_worker.EmulatedCommunicator"


def test_memory_and_cards_are_those_of_the_device(gcu300):
    found, _ = gcu300
    assert found["cards"] == 1  # two, of which the device control variable shows one
    assert found["total"] == 1 << 30 and 0 < found["free"] <= found["total"] and found["used"] == 0


@pytest.mark.slow
def test_a_gcu400_keeps_fp8(model, tmp_path):
    found, log = configured(tmp_path, model, "gcu400")
    assert found["platform"][-1] is True and found["cards"] == 2
    assert "has no fp8" not in log
