"""What is asked wrongly is one clear error, and nothing half-written is left behind."""

import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine import SMALL, run
from tiny import save_llama

pytestmark = pytest.mark.vllm
# Only configurations are made, all in one process: no engine starts.
CONFIGURE = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs
errors = []
for settings, environ in json.loads(sys.argv[1]):
    os.environ.update(environ)
    try:
        EngineArgs(skip_tokenizer_init=True, **settings).create_engine_config()
        errors.append(None)
    except Exception as error:
        errors.append(str(error))
    for name in environ:
        del os.environ[name]
print("ERRORS " + json.dumps(errors))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def test_a_wrong_word_is_an_error_that_names_the_right_ones(model, tmp_path):
    good = {"model": str(model)}
    cases = [
        (good, {}, None),
        ({**good, "dtype": "float33"}, {}, ["float33", "bfloat16", "float32"]),
        ({**good, "quantization": "gptq9"}, {}, ["gptq9", "gptq", "compressed-tensors"]),
        (good, {"GCU_COMPILE_TARGET": "gcu300"}, ["'gcu300'", "torch_gcu", "GCU_COMPILE_TARGET=host"]),
        (good, {"GCU_COMPILE_TARGET": "gcu30"}, ["'gcu30'", "'gcu300'"]),
        (good, {"GCU_COMPILE_DISABLE_RULE": "x"}, ["GCU_COMPILE_DISABLE_RULE", "Did you mean", "DISABLE_RULES"]),
        ({"model": str(tmp_path)}, {}, [str(tmp_path), "config"]),
        (good, {}, None),
    ]
    asked = json.dumps([(settings, environ) for settings, environ, _ in cases])
    done = subprocess.run([sys.executable, "-c", CONFIGURE, asked], capture_output=True, text=True, timeout=300)
    assert "ERRORS " in done.stdout, done.stderr[-3000:]
    errors = json.loads(done.stdout.rpartition("ERRORS ")[2].splitlines()[0])
    for (settings, environ, messages), error in zip(cases, errors, strict=True):
        assert (error is None) == (messages is None), (settings, environ, error)
        for message in messages or ():
            assert message in error


def request(model: Path) -> dict:
    return {
        "llm": {"model": str(model), **SMALL},
        "prompts": [[5, 6, 7]],
        "sampling": {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "detokenize": False},
    }


def test_two_processes_compile_the_same_model_at_once(model, tmp_path):
    shared = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda name: run(tmp_path / name, request(model), **shared), ("one", "two")))
    later = run(tmp_path / "three", request(model), **shared)
    assert both[0].get("tokens") and both[0]["tokens"] == both[1]["tokens"], both[0]["log"][-2000:]
    assert later.get("tokens") == both[0]["tokens"] and "load AOT compilation" in later["log"]


def test_a_cache_folder_that_cannot_be_made_is_a_warning(model, tmp_path):
    (tmp_path / "file").write_text("")
    eager = request(model)  # the sampler's kernel is built all the same
    eager["llm"]["enforce_eager"] = True
    reply = run(tmp_path / "run", eager, GCU_COMPILE_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert reply.get("tokens"), reply["log"][-3000:]
    assert "cannot be written" in reply["log"]


def test_a_full_disk_leaves_no_half_written_model(tmp_path):
    """No file may grow past 1 MB: what a write meets on a full disk."""
    code = f"""
from pathlib import Path
from gcu_compile.demo_model import ensure_demo_model
ensure_demo_model(Path({str(tmp_path / "model")!r}))
"""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, preexec_fn=limit)
    assert done.returncode and "Error" in done.stderr
    assert not (tmp_path / "model").exists(), done.stderr[-2000:]
