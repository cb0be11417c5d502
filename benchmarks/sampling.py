"""One step of post-processing: `gcu::sample` against stock vLLM's sampler and one pass over the logits.

It is called as generated code and our sampler in vLLM call it, past torch's dispatcher (`kernels/direct.py`).

    python benchmarks/sampling.py [--json FILE]

The floor is the time to read the logits once at the bandwidth measured here, on a buffer larger than the caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import gcu_compile.kernels.sampling  # noqa: F401
from gcu_compile.kernels import direct

ROWS, VOCABULARIES, REPEATS = (1, 8, 32), (49152, 151936), 15


def median(fn) -> float:
    """Milliseconds."""
    fn()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def bandwidth() -> float:
    """Bytes per millisecond of a plain read, all threads."""
    buffer = torch.ones(1 << 28, dtype=torch.uint8).view(torch.float32)
    return buffer.nbytes / median(buffer.sum)


def settings(name: str, rows: int, vocab: int) -> dict[str, torch.Tensor]:
    found = {"temperature": torch.ones(rows)}
    if name in ("top-p", "top-k+top-p", "all"):
        found["top_p"] = torch.full((rows,), 0.9)
    if name in ("top-k+top-p", "all"):
        found["top_k"] = torch.full((rows,), 50, dtype=torch.int32)
    if name == "all":
        ids = torch.stack([torch.randperm(vocab)[:500].sort().values for _ in range(rows)])
        found |= {
            "min_p": torch.full((rows,), 0.01),
            "history_offsets": torch.arange(rows + 1) * 500,
            "history_ids": ids.flatten().to(torch.int32),
            "history_counts": torch.ones(rows * 500, dtype=torch.int32),
            "repetition": torch.full((rows,), 1.1),
            "frequency": torch.full((rows,), 0.1),
            "presence": torch.full((rows,), 0.1),
        }
    return found


def stock(asked: dict[str, torch.Tensor], logits: torch.Tensor):
    """The same chain by the parts of vLLM's sampler, in its order."""
    from vllm.model_executor.layers.utils import apply_penalties
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    sampler = TopKTopPSampler()
    rows, vocab = logits.shape

    def run():
        x = logits.to(torch.float32)
        if "history_ids" in asked:
            tokens = asked["history_ids"].view(rows, -1).long()
            nothing = torch.full((rows, 1), vocab)
            names = ("presence", "frequency", "repetition")
            x = apply_penalties(x, nothing, tokens, *(asked[name] for name in names))
        x = x.div_(asked["temperature"].unsqueeze(1))
        if "min_p" in asked:
            probabilities = x.softmax(-1)
            limit = probabilities.amax(-1, keepdim=True) * asked["min_p"].unsqueeze(1)
            x.masked_fill_(probabilities < limit, -torch.inf)
        return sampler(x, {}, asked.get("top_k"), asked.get("top_p"))[0]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    speed = bandwidth()
    print(f"read bandwidth {speed / 1e6:.1f} GB/s, {torch.get_num_threads()} threads, bfloat16 logits")
    print("| rows | vocabulary | chain | ours ms | stock ms | ratio | one-pass floor ms | ours / floor |")
    print("|--:|--:|---|--:|--:|--:|--:|--:|")
    results = []
    for rows in ROWS:
        for vocab in VOCABULARIES:
            logits = (torch.randn(rows, vocab) * 3).bfloat16()
            floor = logits.nbytes / speed
            for name in ("none", "top-p", "top-k+top-p", "all"):
                asked = settings(name, rows, vocab)
                seeds, positions = torch.arange(rows), torch.arange(rows)
                ours = median(lambda: direct.sample(logits, seeds, positions, **asked))  # noqa: B023
                theirs = median(stock(asked, logits))
                row = {"rows": rows, "vocab": vocab, "chain": name, "ours_ms": ours, "stock_ms": theirs}
                results.append(row | {"ratio": theirs / ours, "floor_ms": floor})
                print(
                    f"| {rows} | {vocab} | {name} | {ours:.3f} | {theirs:.2f} | {theirs / ours:.1f} | {floor:.3f} "
                    f"| {ours / floor:.1f} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
