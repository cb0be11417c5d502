"""Perplexity of what `gcu-compile quantize` writes, beside the model that it was given.

    python benchmarks/quantised_accuracy.py MODEL DOCS.jsonl [--formats w4a16,w8a8,...] [--windows N] [--json FILE]

DOCS.jsonl has a text field per line. Windows of 512 tokens; bfloat16 through vLLM with gcu-compile, without compiling
(each format in a process of its own), and through transformers with the checkpoint's weights dequantised to float32.
A name with c8 has an int8 KV cache beside it; `--calibration FILE` (text) gives that cache scales of its own. `--method
gptq` solves for the calibration's text instead of rounding to nearest; `--asymmetric` stores zero points.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WINDOW = 512
FORMATS = "w4a16,w8a16,w8a8,w4a16c8,w8a8c8"


def windows(model: str, docs: Path, count: int) -> list[list[int]]:
    """Token ids of the documents' text, cut."""
    from transformers import AutoTokenizer

    lines = [json.loads(line) for line in docs.read_text().splitlines()]
    text = "\n\n".join(next(v for v in line.values() if isinstance(v, str)) for line in lines)
    ids = AutoTokenizer.from_pretrained(model)(text[: count * WINDOW * 8])["input_ids"]
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(min(count, len(ids) // WINDOW))]


def through_vllm(model: str, batches: list[list[int]]) -> float:
    """Mean log-probability of the windows' tokens, in bfloat16."""
    from vllm import LLM, SamplingParams

    settings = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 30, "enforce_eager": True}
    llm = LLM(model, dtype="bfloat16", **settings)
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in batches], sampling, use_tqdm=False)
    found = [
        entry[token].logprob
        for output in outputs
        for entry, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    ]
    return sum(found) / len(found)


def through_transformers(model: str, batches: list[list[int]]) -> float:
    """The same of the dequantised weights, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    quantised = "quantization_config" in json.loads((Path(model) / "config.json").read_text())
    settings = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantised else {}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **settings).eval()
    found = []
    with torch.no_grad():
        for ids in batches:
            row = torch.tensor([ids])
            logprobs = network(row).logits[0, :-1].log_softmax(-1)
            found.append(logprobs.gather(1, row[0, 1:, None]).mean())
    return torch.stack(found).mean().item()


def child(side: str, model: str, batches: str) -> None:
    """One measurement, as JSON on the last line."""
    run = through_vllm if side == "vllm" else through_transformers
    print("RESULT " + json.dumps(run(model, json.loads(Path(batches).read_text()))))


def measure(side: str, model: Path, batches: Path) -> float:
    words = [sys.executable, __file__, str(model), "none", "--child", side, "--batches", str(batches)]
    run = subprocess.run(words, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{side} failed on {model}:\n{run.stderr[-3000:]}")
    return math.exp(-json.loads(lines[-1].removeprefix("RESULT ")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("docs", type=Path)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--method", default="nearest")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--batches", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, str(arguments.model), arguments.batches)
    from gcu_compile.quantize import quantize

    texts = None if arguments.calibration is None else arguments.calibration.read_text().splitlines()
    results = {}
    print("| | bytes | perplexity, vLLM | perplexity, transformers | mean error of a weight |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        batches = Path(folder) / "batches.json"
        batches.write_text(json.dumps(windows(str(arguments.model), arguments.docs, arguments.windows)))
        for name in ("", *filter(None, arguments.formats.split(","))):
            model, error = arguments.model, 0.0
            if name:
                model, cache = Path(folder) / name, name.endswith("c8")
                calibration = texts if cache or arguments.method == "gptq" else None
                form, method = name.removesuffix("c8"), arguments.method
                how = {"cache": cache, "method": method, "asymmetric": arguments.asymmetric}
                report = quantize(arguments.model, model, form, calibration=calibration, **how)
                error = sum(layer["relative"] for layer in report["layers"]) / len(report["layers"])
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            found = {side: measure(side, model, batches) for side in ("vllm", "transformers")}
            results[name or "original"] = {"bytes": size, "error": error, **found}
            print(
                f"| {name or 'original'} | {size / 1e6:.0f} MB | {found['vllm']:.3f} | {found['transformers']:.3f} "
                f"| {error:.4f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
