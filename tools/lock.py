"""Write requirements/host.lock: every package of the host environment, pinned.

Resolves the extras with pip, then leaves out what must not be installed beside CPU torch. Run it in the
project's virtual environment after changing a dependency:  python tools/lock.py
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("host", "test", "bench")
# CUDA builds on the index: importing them beside CPU torch fails ("operator torchvision::nms does not exist").
LEFT_OUT = re.compile(r"^(torchvision|torchaudio|torchcodec|nvidia-.*|gcu-compile)$")
HEADER = """\
# The host environment, exactly. Written by tools/lock.py; install with: pip install --no-deps -r requirements/host.lock
# torch has no local suffix on purpose: pip then takes a CPU build wherever one is offered.
"""


def main() -> None:
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        target = f"{ROOT}[{','.join(EXTRAS)}]"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", report.name, target], check=True)
        installs = json.loads(Path(report.name).read_text())["install"]
    pins = {}
    for item in installs:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        if not LEFT_OUT.match(name):
            pins[name] = item["metadata"]["version"].split("+")[0]
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    aside = ROOT / "requirements" / "host.lock.tmp"
    aside.write_text(HEADER + "".join(lines))
    aside.replace(ROOT / "requirements" / "host.lock")
    print(f"{len(lines)} packages pinned")


if __name__ == "__main__":
    main()
