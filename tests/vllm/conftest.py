"""vLLM tests are left out, and say so, where vLLM is not installed: `gcu_compile` works without it."""

import importlib.util
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header(config):
    return "vLLM is not installed: tests/vllm is left out" if importlib.util.find_spec("vllm") is None else None
