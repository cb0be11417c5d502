"""Decode speed of quantised models end to end: each format in gcu-compile and in stock vLLM, all of them in turns.

    python benchmarks/quantised_throughput.py MODEL [--formats bf16 w4a16 w8a8] [--random] [--sides ours stock]
                                              [--tokens N] [--rounds N] [--caches DIR] [--json FILE]

MODEL is a folder. bf16 is the model as it is; another format is one of `gcu-compile quantize`, which is applied first.
`--random`: MODEL needs only a config.json; a checkpoint of random weights is written first. Checkpoints and compiled
graphs are kept in `--caches`, so that a second run finds them.

Every engine is a process group of its own. All live at once, and while one generates the others are stopped; they take
turns in every round, so that what the machine does beside it meets all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sides

PROMPT, BATCHES = 16, (1, 16)


def child(model: str) -> None:
    """An engine: says how long its start took, then for every line `ROWS TOKENS` how many tokens a second it made."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=512,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    sides.tell({"start_s": time.perf_counter() - start})
    for turn, line in enumerate(sys.stdin):
        rows, tokens = map(int, line.split())
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [(7 * row + 13 * i + turn) % 20000 + 100 for i in range(PROMPT)]}
            for row in range(rows)
        ]
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        sides.tell({"tokens_per_s": rows * tokens / (time.perf_counter() - begin)})


class Engine:
    """A child that runs only while it is asked for something.

    Attributes:
        failed: the last line of its error, or "".
    """

    def __init__(self, model: Path, caches: Path, stock: bool):
        self.failed, self._log = "", caches / f"{model.name}.log"
        caches.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model), "--child"],
            env=sides.environment(caches, stock),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            start_new_session=True,
        )
        self.start_s: float | None = None

    def start(self) -> None:
        """Waits until it is up. Not before somebody holds it who closes it."""
        self.start_s = (self._answer() or {}).get("start_s")
        self._signal(signal.SIGSTOP)

    def _signal(self, which: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, which)

    def _answer(self) -> dict | None:
        for line in self._process.stdout:
            if line.startswith(sides.RESULT):
                return json.loads(line.removeprefix(sides.RESULT))
        errors = [line for line in self._log.read_text().splitlines() if "Error" in line]
        self.failed = errors[-1].strip() if errors else f"no answer; see {self._log}"
        return None

    def generate(self, rows: int, tokens: int) -> float | None:
        """Tokens a second; None if it failed, now or before."""
        if self.failed:
            return None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(f"{rows} {tokens}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer and answer["tokens_per_s"]

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its engine may outlive it


def random_checkpoint(config: Path, out: Path) -> Path:
    """A checkpoint of random bfloat16 weights for the config.json of `config`."""
    if not out.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.bfloat16)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            model.save_pretrained(folder)
            shutil.copytree(folder, out)
    return out


def prepare(model: Path, name: str, folder: Path) -> Path:
    """The checkpoint to serve."""
    if name == "bf16":
        return model
    from gcu_compile import quantize as quantiser

    out = folder / f"{model.name}-{name}"
    if not out.exists():
        quantiser.quantize(model, out, name)
    return out


def take_turns(engines: dict[tuple[str, str], Engine], rounds: int, tokens: int) -> dict:
    """Batch -> engine -> tokens a second in each round (None: it failed); a first, short turn of each warms up."""
    found = {rows: {name: [] for name in engines} for rows in BATCHES}
    names = list(engines)
    for rows, of_batch in found.items():
        for engine in engines.values():
            engine.generate(rows, 8)
        for number in range(rounds):
            at = number % len(names)
            for name in names[at:] + names[:at]:  # nobody is always first
                of_batch[name].append(engines[name].generate(rows, tokens))
    return found


def cell(values: list[float | None] | None) -> str:
    if not values:
        return ""
    if None in values:
        return "fails"
    return f"{statistics.median(values):.1f} ({sorted(values)[-1 - len(values) // 10]:.1f})"


def ratio(over: list[float | None] | None, under: list[float | None] | None) -> str:
    """Median of the rounds' ratios."""
    if not over or not under or None in over or None in under:
        return ""
    return f"{statistics.median(a / b for a, b in zip(over, under, strict=True)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", nargs="+", default=["bf16", "w4a16", "w8a8"])
    parser.add_argument("--sides", nargs="+", default=["ours", "stock"], choices=["ours", "stock"])
    parser.add_argument("--random", action="store_true", help="random weights; the folder needs only a config.json")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--caches", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(str(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        caches = arguments.caches or Path(folder)
        caches.mkdir(parents=True, exist_ok=True)
        model = arguments.model
        if arguments.random:
            model = random_checkpoint(model, caches / f"{model.name}-random")
        engines = {}
        try:
            for form in arguments.formats:
                served = prepare(model, form, caches)
                for side in arguments.sides:
                    engine = engines[form, side] = Engine(served, caches / side, side == "stock")
                    engine.start()
                    started = engine.start_s
                    print(f"{form}, {side}: {'failed' if started is None else f'up in {started:.0f} s'}", flush=True)
            found = take_turns(engines, arguments.rounds, arguments.tokens)
        finally:
            for engine in engines.values():
                engine.close()
    print(f"\n{arguments.model.name}, {arguments.rounds} rounds of {arguments.tokens} tokens")
    print("median (90th percentile) of tokens/s; ratios are medians of the rounds'\n")
    print("| batch | format | ours | stock | ours / stock | ours / ours bf16 | ours / stock bf16 |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for rows, of_batch in found.items():
        for form in arguments.formats:
            ours, stock = (of_batch.get((form, side)) for side in ("ours", "stock"))
            peers = ((form, "stock"), ("bf16", "ours"), ("bf16", "stock"))
            ratios = [ratio(ours, of_batch.get(peer)) for peer in peers]
            print(f"| {rows} | {form} | {cell(ours)} | {cell(stock)} | {' | '.join(ratios)} |")
    for (form, side), engine in engines.items():
        if engine.failed:
            print(f"{form}, {side} failed: {engine.failed}")
    if arguments.json:
        kept = {
            f"{form} {side} batch {rows}": values
            for rows, of_batch in found.items()
            for (form, side), values in of_batch.items()
        }
        arguments.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
