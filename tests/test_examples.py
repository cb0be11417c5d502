"""The examples that need no vLLM run as they stand; `tests/vllm/` runs the others."""

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


def test_the_wrong_answer_of_the_debugging_guide(tmp_path):
    """Bisect names what `docs/debugging.md` says that it names."""
    words = ["bisect", str(EXAMPLES / "wrong.py:case"), "--set", "inductor=0", "--script", str(tmp_path / "again.py")]
    run = subprocess.run([sys.executable, "-m", "gcu_compile.cli.main", *words], capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    found = " ".join(run.stdout.split()).partition(" (largest")[0]
    assert "layers.2" in found and found in (EXAMPLES.parent / "docs" / "debugging.md").read_text()
