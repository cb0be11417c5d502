"""Offline speed and start time of a model: gcu-compile against stock vLLM, in turns.

    python benchmarks/throughput.py MODEL [--json FILE] [--rounds N]

Each side has caches of its own, empty at first: its first start is the cold one, the later ones are warm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import sides

TOKENS, PROMPT, PREFILL, REPEATS = 128, 16, 2000, 3


def child(model: str) -> None:
    """One start and its measurements, as JSON on the last line."""
    start = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(model, max_model_len=4096, kv_cache_memory_bytes=2 << 30, enable_prefix_caching=False)
    result = {"start_s": time.perf_counter() - start}

    def timed(rows: int, length: int, **sampling) -> float:
        times = []
        for repeat in range(REPEATS + 1):
            prompts = [
                {"prompt_token_ids": [(7 * row + 13 * i + repeat) % 40000 + 100 for i in range(length)]}
                for row in range(rows)
            ]
            begin = time.perf_counter()
            llm.generate(prompts, SamplingParams(ignore_eos=True, detokenize=False, **sampling), use_tqdm=False)
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])  # the first one warms up

    for rows in (1, 16):
        result[f"greedy_{rows}_tok_s"] = rows * TOKENS / timed(rows, PROMPT, temperature=0, max_tokens=TOKENS)
        top_p = timed(rows, PROMPT, temperature=1.0, top_p=0.9, max_tokens=TOKENS)
        result[f"top_p_{rows}_tok_s"] = rows * TOKENS / top_p
    result["prefill_tok_s"] = PREFILL / timed(1, PREFILL, temperature=0, max_tokens=1)
    sides.tell(result)


def measure(model: str, caches: Path, stock: bool) -> dict[str, float]:
    result, output = sides.run(__file__, ["--child", model], caches, stock)
    if result is None:
        raise SystemExit(f"the {'stock' if stock else 'gcu'} run failed:\n{output[-3000:]}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=2, help="starts of each side; the first is cold")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        rounds = [
            (
                measure(arguments.model, Path(folder) / "gcu", stock=False),
                measure(arguments.model, Path(folder) / "stock", stock=True),
            )
            for _ in range(arguments.rounds)
        ]
    ours, theirs = ([pair[side] for pair in rounds] for side in (0, 1))
    print("| | ours | stock | ratio |\n|---|--:|--:|--:|")
    for name, starts in (("cold start, s", slice(1)), ("warm start, s", slice(1, None))):
        if not ours[starts]:  # one round has no warm start
            continue
        a, b = (statistics.median(r["start_s"] for r in side[starts]) for side in (ours, theirs))
        print(f"| {name} | {a:.1f} | {b:.1f} | {b / a:.2f} |")
    for key in (key for key in ours[0] if key.endswith("tok_s")):
        a, b = (statistics.median(r[key] for r in side) for side in (ours, theirs))
        print(f"| {key.removesuffix('_tok_s').replace('_', ' ')}, tokens/s | {a:.1f} | {b:.1f} | {a / b:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ours": ours, "stock": theirs}, indent=1))


if __name__ == "__main__":
    main()
