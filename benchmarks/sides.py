"""One side of a comparison in a process of its own: gcu-compile, or stock vLLM in the same environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULT = "RESULT "


def tell(result: dict[str, Any]) -> None:
    """What a child says last."""
    print(RESULT + json.dumps(result))


def environment(caches: Path, stock: bool) -> dict[str, str]:
    """Of a child whose caches are its own."""
    env = {
        **os.environ,
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "GCU_COMPILE_CACHE_DIR": str(caches / "gcu"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if stock:
        env["VLLM_PLUGINS"] = ""
    return env


def run(script: str, words: list[str], caches: Path, stock: bool) -> tuple[dict[str, Any] | None, str]:
    """What `script` tells when it runs with `words` and caches of its own; None if it failed; and its output."""
    command = [sys.executable, script, *words]
    done = subprocess.run(command, env=environment(caches, stock), capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    return json.loads(told[-1].removeprefix(RESULT)) if told else None, done.stdout + done.stderr
