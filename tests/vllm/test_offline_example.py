"""The offline example runs as it stands: on a tiny model always, on the demo model among the long tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_llama, save_tokenizer

pytestmark = pytest.mark.vllm
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "offline_inference.py"


def answers(folder: Path, *words: str) -> str:
    env = {**os.environ, "VLLM_CACHE_ROOT": str(folder / "vllm")}
    run = subprocess.run([sys.executable, str(EXAMPLE), *words], capture_output=True, env=env, timeout=600)
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-3000:]
    return run.stdout.decode(errors="replace")  # a random model writes bytes that are no text


def test_tiny_model(tmp_path):
    model = save_tokenizer(save_llama(tmp_path / "model", max_position_embeddings=2048))
    said = answers(tmp_path, str(model))
    for question in ("What is the capital of France?", "Name three primary colours.", "Why is the sky blue?"):
        assert question in said


@pytest.mark.slow
def test_demo_model(tmp_path):
    assert "Paris" in answers(tmp_path)
