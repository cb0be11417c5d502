"""Decode speed of quantised models end to end: gcu-compile in each format, stock vLLM with the same checkpoint.

    python benchmarks/quantised_throughput.py MODEL --format w4a16 [--dummy] [--caches DIR] [--rounds N] [--json FILE]

MODEL is a folder. `--format`: bf16 (the model as it is), or a format of `gcu-compile quantize`, which is applied
first. `--dummy`: MODEL needs only a config.json; the weights are random. Both sides run in turns, each start with its
own caches, kept in `--caches` so that a second run does not compile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import sides

PROMPT, BATCHES = 16, (1, 16)


def child(model: str, dummy: bool, tokens: int, repeats: int) -> None:
    """One start and its measurements, as JSON on the last line."""
    from vllm import LLM, SamplingParams

    settings = {"load_format": "dummy", "skip_tokenizer_init": True} if dummy else {}
    start = time.perf_counter()
    llm = LLM(
        model,
        dtype="bfloat16",
        max_model_len=512,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        **settings,
    )
    result = {"start_s": time.perf_counter() - start}
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for rows in BATCHES:
        times = []
        for repeat in range(repeats + 1):
            prompts = [
                {"prompt_token_ids": [(7 * row + 13 * i + repeat) % 20000 + 100 for i in range(PROMPT)]}
                for row in range(rows)
            ]
            begin = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            times.append(time.perf_counter() - begin)
        result[f"batch {rows}"] = rows * tokens / statistics.median(times[1:])  # the first one warms up
    sides.tell(result)


def measure(words: list[str], caches: Path, stock: bool) -> dict[str, float] | str:
    """What a child says, or the last line of its error."""
    result, output = sides.run(__file__, words, caches, stock)
    if result is not None:
        return result
    errors = [line for line in output.splitlines() if "Error" in line]
    return errors[-1].strip() if errors else output[-300:]


def prepare(model: Path, name: str, dummy: bool, folder: Path) -> Path:
    """The checkpoint to serve."""
    if name == "bf16":
        return model
    from gcu_compile import quantize as quantiser

    out = folder / f"{model.name}-{name}"
    if out.exists():
        return out
    if not dummy:
        quantiser.quantize(model, out, name)
        return out
    out.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text())
    form = quantiser.FORMATS[name]
    size = form.group_size(config["hidden_size"], config["intermediate_size"])
    config["quantization_config"] = quantiser.scheme(form, size, routers=False)
    for file in model.glob("*.json"):
        shutil.copy(file, out)
    (out / "config.json").write_text(json.dumps(config))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--dummy", action="store_true", help="random weights; the folder needs only a config.json")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="starts of each side")
    parser.add_argument("--caches", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(str(arguments.model), arguments.dummy, arguments.tokens, arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        caches = arguments.caches or Path(folder)
        served = prepare(arguments.model, arguments.format, arguments.dummy, caches)
        words = [str(served), "--child", *(["--dummy"] if arguments.dummy else [])]
        words += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
        figures = {"ours": [], "stock": []}
        for _ in range(arguments.rounds):
            for side, found in figures.items():
                found.append(measure(words, caches / side, stock=side == "stock"))
    print(f"| {arguments.model.name}, {arguments.format}, tokens/s | ours | stock | ratio |\n|---|--:|--:|--:|")
    for rows in BATCHES:
        key, values = f"batch {rows}", []
        for found in figures.values():
            each = [one[key] for one in found if isinstance(one, dict)]
            values.append(statistics.median(each) if each else None)
        cells = ["fails" if value is None else f"{value:.1f}" for value in values]
        ratio = "" if None in values else f"{values[0] / values[1]:.2f}"
        print(f"| {key} | {cells[0]} | {cells[1]} | {ratio} |")
    for side, found in figures.items():
        for one in found:
            if isinstance(one, str):
                print(f"{side} failed: {one}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
