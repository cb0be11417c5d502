"""Cross-compiles the benchmark configs for a card, beside Inductor's own Triton scheduling, and prints a table.

    python benchmarks/cross_compile.py --layers 4 --tokens 2048 --json table.json [NAME ...]

Each model is compiled in a process of its own; its peak memory is that process's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = str(Path(sys.executable).with_name("gcu-compile"))
COLUMNS = (
    "| model | weights | graph | kernels | launches + calls | aborts / errors / 64-bit / known wrong | DMA slices "
    "| predicted ms | Inductor: errors, slices, predicted ms |"
)


def configs() -> dict[str, Any]:
    """The configs of `tests/benchmarks/configs.py`."""
    spec = importlib.util.spec_from_file_location("configs", ROOT / "tests" / "benchmarks" / "configs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CONFIGS


def measure(name: str, config: dict[str, Any], weights: str, words: list[str]) -> dict[str, Any]:
    """One model: its report without sources, seconds, peak memory of the process in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "config.json", Path(folder) / "all.json"
        file.write_text(json.dumps(config))
        start = time.perf_counter()
        command = [COMMAND, "cross-compile", str(file), "--weights", weights, "--json", str(out), *words]
        result = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if not out.exists():
            return {"model": name, "weights": weights, "error": result.stderr[-2000:]}
        report = json.loads(out.read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    graphs = {
        graph: {
            "totals": entry["totals"],
            "baseline": entry.get("baseline", {}).get("totals"),
            "seconds": entry["seconds"],
            "fused": entry["lowering"]["fused"],
            "legalise": entry["lowering"]["counts"].get("legalise", {}),
        }
        for graph, entry in report["graphs"].items()
    }
    return {"model": name, "weights": weights, "seconds": seconds, "peak_bytes": peak, "graphs": graphs}


def rows(entry: dict[str, Any]) -> list[str]:
    """Lines of the table."""
    if "error" in entry:
        return [f"| {entry['model']} | {entry['weights']} | failed: {entry['error'].strip().splitlines()[-1]} |"]
    lines = []
    for graph, one in entry["graphs"].items():
        t, b = one["totals"], one["baseline"]
        beside = ""
        if b is not None:
            illegal = b["errors"] + b["aborts"]
            beside = f"{illegal}, {100 * b['dma_share']:.1f} %, {b['microseconds'] / 1e3:.2f}"
        lines.append(
            f"| {entry['model']} | {entry['weights']} | {graph} | {t['kernels']} "
            f"| {t['kernel_launches']} + {t['calls']} "
            f"| {t['aborts']} / {t['errors']} / {t['wide']} / {t['known_wrong']} "
            f"| {100 * t['dma_share']:.2f} % | {t['microseconds'] / 1e3:.2f} | {beside} |"
        )
    return lines


def gathers(results: list[dict[str, Any]]) -> list[str]:
    """Lines of the second table: what no slice moves, and why; accesses alike are one line."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for entry in results:
        for graph, one in entry.get("graphs", {}).items():
            for access in one["totals"]["gathers"]:
                tile = f"{'x'.join(map(str, access['shape']))} {access['element']}"
                why = re.sub(r" \(line \d+\)|^tt\.(load|store) of \S+: ", "", access["why"])
                found.setdefault((entry["model"], tile, why), []).append(f"{entry['weights']} {graph}")
    lines = []
    for (model, tile, why), places in found.items():
        each = ", ".join(f"{count} in {place}" for place, count in Counter(places).items())
        lines.append(f"| {model} | {tile} | {each} | {why} |")
    return lines


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="configs; default: all")
    parser.add_argument("--layers", default="0", help="only the first N layers; 0: all")
    parser.add_argument("--tokens", default="2048")
    parser.add_argument("--weights", default="bf16,w4a16")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    words = ["--layers", given.layers, "--tokens", given.tokens, *([] if given.no_baseline else ["--baseline"])]
    results = []
    print(COLUMNS + "\n|" + "---|" * COLUMNS.count(" |"), flush=True)
    for name, config in configs().items():
        if given.names and name not in given.names:
            continue
        for weights in given.weights.split(","):
            results.append(measure(name, config, weights, words))
            print("\n".join(rows(results[-1])), flush=True)
            if given.json:
                given.json.write_text(json.dumps(results, indent=1))
    print("\n| model | tile that is gathered | accesses | why |\n|---|---|---|---|")
    print("\n".join(gathers(results)))


if __name__ == "__main__":
    main()
