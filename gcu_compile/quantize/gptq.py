"""GPTQ (arXiv 2210.17323) through llmcompressor, in an environment of its own: it pins another transformers than ours.

The environment is made once, in the user's cache folder, from `gptq.lock`; or name the Python of one that has
llmcompressor. `gptq_worker.py` runs there and leaves a checkpoint, from which codes and scales are taken: files,
names, configuration and the KV cache's scales are written here, as for weights rounded to nearest.
"""

from __future__ import annotations

import collections
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from gcu_compile.errors import CheckpointError, GcuCompileError
from gcu_compile.options import default_cache_dir
from gcu_compile.quantize.stored import Stored

HERE = Path(__file__).parent
LOCK = HERE / "gptq.lock"
WORKER = HERE / "gptq_worker.py"
TOKENS = 2048  # of one text; what is longer is cut
TOLD = 12  # lines of a failed program that its error repeats


def solve(
    model: Path,
    aside: Path,
    scheme: dict[str, Any],
    linears: Iterable[str],
    texts: list[str],
    ready: Callable[[str], None],
    python: Path | None = None,
) -> Stored:
    """Quantise the checkpoint `model` into the folder `aside`.

    Args:
        scheme: `quantization_config` of compressed-tensors, with one group.
        linears: names of the weights that must come out quantised.
        texts: what the model reads; the layers' errors are weighed by what they saw of these.
        ready: called with a layer's name when its codes are known.
        python: of an environment that has llmcompressor; None: that of `environment`.

    Raises:
        GcuCompileError: no environment, or a run that failed, with the last lines of what it said.
        CheckpointError: a layer that llmcompressor left as it was.
    """
    model, aside = model.absolute(), aside.absolute()  # it runs in a folder of its own
    (group,) = scheme["config_groups"].values()
    job = {
        "model": str(model),
        "out": str(aside / "solved"),
        "weights": group["weights"],
        "activations": group["input_activations"],
        "ignore": scheme["ignore"],
        "texts": texts,
        "tokens": TOKENS,
    }
    file = aside / "job.json"
    file.write_text(json.dumps(job))
    python = (python or environment()).absolute()
    if not python.exists():
        raise GcuCompileError(f"there is no {python} to run llmcompressor with")
    words = [str(python), "-u", str(WORKER), str(file)]
    said = collections.deque(maxlen=TOLD)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=aside) as run:
        try:
            for line in run.stdout:
                said.append(line)
                if line.startswith("quantised "):
                    ready(line.split()[1])
        except BaseException:
            run.kill()
            raise
    if run.returncode:
        raise GcuCompileError(f"llmcompressor failed ({run.returncode}) on {model}:\n{''.join(said)}")
    stored = Stored(aside / "solved", group["weights"]["num_bits"], group["weights"].get("group_size"))
    if left := [name for name in linears if name not in stored]:
        raise CheckpointError(f"llmcompressor left {len(left)} layers as they were: {left[0]}; use --method nearest")
    return stored


def environment(folder: Path | None = None) -> Path:
    """The Python of llmcompressor's environment in `folder` (None: the user's cache), made there if it is missing.

    Raises:
        GcuCompileError: pip could not install it, or it cannot be imported; nothing is left then.
    """
    name = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    folder = folder or Path(default_cache_dir()) / "llmcompressor" / name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if stamp.exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)  # one whose making was cut short
        print(f"making an environment for llmcompressor in {folder} (once, about 2 GB)", file=sys.stderr)
        try:
            _run("venv", sys.executable, "-m", "venv", str(folder))
            pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
            _run("pip", *pip, "-r", str(LOCK))
            _run("import", str(python), "-c", "import llmcompressor")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        stamp.touch()
    return python


def _run(what: str, *words: str) -> None:
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        lines = "\n".join((result.stderr or result.stdout).splitlines()[-TOLD:])
        raise GcuCompileError(
            f"no environment for llmcompressor: {what} failed:\n{lines}\n"
            "Install llmcompressor in an environment of your own and name its Python (--llmcompressor), or use "
            "--method nearest"
        )
