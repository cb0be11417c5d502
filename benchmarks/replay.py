"""Milliseconds of a decode step with and without replay (`docs/replay.md`), in turns in one engine.

    python benchmarks/replay.py MODEL [--batches 1 16] [--tokens N] [--rounds N] [--tokenizer FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

PROMPT = 16


def steps(llm: Any, rows: int, tokens: int, shift: int) -> float:
    """Milliseconds of a step, greedy: the whole of `generate`, over its number of steps."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 * row + 13 * i + shift) % 40000 + 100 for i in range(PROMPT)]} for row in range(rows)
    ]
    sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=tokens)
    begin = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return (time.perf_counter() - begin) / tokens * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokenizer", help="of a checkpoint that has none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker is in this process
    from vllm import LLM

    llm = LLM(
        arguments.model,
        tokenizer=arguments.tokenizer,
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner, replay = worker.model_runner, worker._replay
    if replay is None:
        raise SystemExit("this engine replays no steps: see docs/replay.md")
    ways = {"replayed": replay, "not": replay._forward}
    measured: dict[int, dict[str, list[float]]] = {}
    for rows in arguments.batches:
        before = replay.replayed
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(arguments.rounds + 1):
            for way, forward in ways.items():
                runner._model_forward = forward
                taken = steps(llm, rows, arguments.tokens, turn)
                if turn:  # the first captures
                    times[way].append(taken)
        measured[rows] = times
        if replay.replayed - before < arguments.rounds * (arguments.tokens - 1):
            raise SystemExit(f"not every step of batch {rows} was replayed: the engine's log says why")
    print("| batch | replayed, ms a step | not | ratio |\n|--:|--:|--:|--:|")
    for rows, times in measured.items():
        ours, other = (statistics.median(times[way]) for way in ways)
        ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        print(f"| {rows} | {ours:.2f} | {other:.2f} | {ratio:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
