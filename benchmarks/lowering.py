"""What lowering adds to the cold compilation of a model: its share of the time, and the whole against plain Inductor.

    python benchmarks/lowering.py MODEL [--rounds N] [--vllm] [--json FILE]

Every compilation is a process of its own with empty caches, through plain transformers and, with `--vllm`, through a
vLLM engine too. Compile time is that of torch's own timers behind Dynamo; `first call` is what a user waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import sides

TOKENS = 16


def transformers_side(model: str, backend: str) -> dict:
    """Compile the whole model with `backend`, as `gcu-compile explain` runs it."""
    import torch

    from gcu_compile import backend as ours
    from gcu_compile.cli.explain import load

    fn, args = load(model, TOKENS)
    fn(*args)  # the weights are read, and the thread pool is up
    start = time.perf_counter()
    torch.compile(fn, backend=backend)(*args)
    return told(ours.recordings) | {"first_call_s": time.perf_counter() - start}


def vllm_side(model: str) -> dict:
    """Start an engine, whose worker lives in this process; the pieces of the model are its recordings."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from gcu_compile import backend as ours

    LLM(model, max_model_len=1024, kv_cache_memory_bytes=256 << 20)
    return told(ours.recordings)


def told(recordings: list) -> dict:
    """Seconds of all that was compiled: of lowering, of the whole, and of the steps."""
    made = [one for one in recordings if one.state != "hit"]
    steps: dict[str, float] = {}
    for step in (step for one in made for report in one.reports for step in report.steps):
        steps[step.name] = steps.get(step.name, 0.0) + step.seconds
    return {
        "graphs": len(made),
        "steps_s": steps,
        "lowering_s": sum(one.seconds["lowering"] for one in made),
        "compile_s": sum(one.seconds["total"] for one in made),
        "states": [one.state for one in recordings],
    }


def measure(model: str, way: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        result, output = sides.run(__file__, [model, "--child", way], Path(folder), stock=False)
    if result is None:
        raise SystemExit(f"the run {way} failed:\n{output[-3000:]}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vllm", action="store_true", help="through a vLLM engine too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side = vllm_side if arguments.child == "vllm" else transformers_side
        words = () if arguments.child == "vllm" else (arguments.child,)
        return sides.tell(side(arguments.model, *words))
    ways = ["gcu", "inductor", *(["vllm"] if arguments.vllm else [])]
    rounds = [{way: measure(arguments.model, way) for way in ways} for _ in range(arguments.rounds)]
    middle = {
        way: {
            name: statistics.median(one[way].get(name, 0.0) for one in rounds)
            for name in ("graphs", "lowering_s", "compile_s", "first_call_s")
        }
        for way in ways
    }
    print("| through | graphs | lowering, s | compile, s | share |\n|---|--:|--:|--:|--:|")
    for way, name in (("gcu", "transformers"), ("vllm", "vLLM")):
        if way in ways:
            of = middle[way]
            share = of["lowering_s"] / of["compile_s"]
            print(f"| {name} | {of['graphs']:g} | {of['lowering_s']:.2f} | {of['compile_s']:.1f} | {share:.1%} |")
    ours, plain = (middle[way]["first_call_s"] for way in ("gcu", "inductor"))
    print(f"\nfirst call, transformers: {ours:.1f} s, plain Inductor {plain:.1f} s, ratio {plain / ours:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
