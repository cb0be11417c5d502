"""The example that needs no vLLM runs as it stands; `tests/vllm/` runs the others."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_plain_pytorch():
    run = subprocess.run([sys.executable, str(EXAMPLES / "plain_pytorch.py")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    differences = [float(number) for number in re.findall(r"from eager (\S+)", run.stdout)]
    assert len(differences) == 3 and max(differences) < 1e-5
