"""What a model says through vLLM and gcu-compile, against transformers.

    python benchmarks/accuracy.py greedy MODEL [--json FILE]
    python benchmarks/accuracy.py perplexity MODEL DOCS.jsonl [--windows N] [--kv-cache-dtype int8] [--json FILE]

`greedy`: fp32, 16 prompts x 64 tokens, token for token, at batch 1 and 16, prefix caching and chunked prefill on and
off. `perplexity`: bf16 on windows of 1024 tokens of the documents' text; DOCS.jsonl has a text field per line. With
`--kv-cache-dtype int8` the same windows go through two engines of our attention, one with a bf16 cache and one with an
int8 cache, and the ratio of both is reported too.
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

TOKENS, WINDOW, STEP = 64, 1024, 4
PROGRESS = "progress: "
TOPICS = (
    *("the sea", "the moon", "bread", "rain", "a small town", "chess", "iron", "winter"),
    *("rivers", "maps", "clocks", "apples", "horses", "glass", "music", "trains"),
)


def prompts() -> list[str]:
    shared = "You are a careful writer who answers in plain words. " * 6  # long enough for a prefix-cache block
    return [f"{shared}Tell me something about {topic}:" for topic in TOPICS]


def transformers_greedy(model: str) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    result = []
    for prompt in prompts():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = network.generate(ids, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, eos_token_id=None)
        result.append(out[0, ids.shape[1] :].tolist())
    return result


def vllm_greedy(request: dict) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(request["model"], dtype="float32", max_model_len=1024, kv_cache_memory_bytes=1 << 30, **request["llm"])
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    groups = [[prompt] for prompt in prompts()] if request["batch"] == 1 else [prompts()]
    return [
        list(output.outputs[0].token_ids)
        for group in groups
        for output in llm.generate(group, sampling, use_tqdm=False)
    ]


def windows(model: str, docs: str, count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    lines = [json.loads(line) for line in Path(docs).read_text().splitlines()]
    text = "\n\n".join(next(v for v in line.values() if isinstance(v, str)) for line in lines)
    ids = AutoTokenizer.from_pretrained(model)(text[: count * WINDOW * 8]).input_ids
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(min(count, len(ids) // WINDOW))]


def transformers_logprobs(model: str, batches: list[list[int]]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    found = []
    with torch.no_grad():
        for ids in batches:
            row = torch.tensor([ids])
            logprobs = network(row).logits[0, :-1].float().log_softmax(-1)
            found += logprobs.gather(1, row[0, 1:, None])[:, 0].tolist()
    return found


def vllm_logprobs(request: dict) -> list[float]:
    from vllm import LLM, SamplingParams

    kind = request["kv_cache_dtype"]
    llm = LLM(
        request["model"], dtype="bfloat16", max_model_len=WINDOW + 8, kv_cache_memory_bytes=1 << 30, kv_cache_dtype=kind
    )
    given = [{"prompt_token_ids": ids} for ids in request["windows"]]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for begin in range(0, len(given), STEP):
        for output in llm.generate(given[begin : begin + STEP], sampling, use_tqdm=False):
            pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            found += [entry[token].logprob for entry, token in pairs]
        done = min(begin + STEP, len(given))
        print(f"{PROGRESS}{kind} cache: {done} of {len(given)} windows, perplexity {exp_mean(found):.4f}", flush=True)
    return found


def exp_mean(logprobs: list[float]) -> float:
    """Perplexity of predictions with these log-probabilities."""
    return math.exp(-sum(logprobs) / len(logprobs))


def in_child(task: str, request: dict, cache: Path, **environ: str):
    """Run `task` in a process of its own: an engine's memory goes when its process does."""
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder) / "request.json", Path(folder) / "errors.txt"
        file.write_text(json.dumps(request))
        env = {**os.environ, "VLLM_CACHE_ROOT": str(cache), **environ}
        words = [sys.executable, __file__, "--child", task, str(file)]
        with errors.open("w") as sink, subprocess.Popen(words, env=env, stdout=-1, stderr=sink, text=True) as run:
            for line in run.stdout:
                if line.startswith(PROGRESS):
                    print(line.removeprefix(PROGRESS), end="", flush=True)
        if run.returncode:
            raise SystemExit(errors.read_text()[-3000:])
        return json.loads((Path(folder) / "reply.json").read_text())


def child(task: str, request_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    reply = {"greedy": vllm_greedy, "logprobs": vllm_logprobs}[task](request)
    Path(request_file).with_name("reply.json").write_text(json.dumps(reply))


def greedy(model: str) -> list[dict]:
    reference, results = transformers_greedy(model), []
    with tempfile.TemporaryDirectory() as cache:
        for warm in (False, True):
            for batch in (1, 16):
                for prefix in (False, True):
                    for chunked in (False, True):
                        if warm and (prefix, chunked) != (True, True):
                            continue  # the warm cache is the same for all
                        llm = {"enable_prefix_caching": prefix, "enable_chunked_prefill": chunked}
                        if chunked:
                            llm["max_num_batched_tokens"] = 64  # smaller than a prompt: really cut into chunks
                        tokens = in_child("greedy", {"model": model, "batch": batch, "llm": llm}, Path(cache))
                        equal = sum(a == b for a, b in zip(tokens, reference, strict=True))
                        result = {"batch": batch, "prefix": prefix, "chunked": chunked, "warm": warm, "equal": equal}
                        results.append(result)
                        print(f"{results[-1]} of {len(reference)} prompts", flush=True)
    return results


def perplexity(model: str, docs: str, count: int, kind: str) -> dict:
    batches = windows(model, docs, count)
    kinds = ["auto"] if kind == "auto" else ["auto", kind]
    # Both caches behind one kernel, whatever the default is.
    environ = {} if kind == "auto" else {"GCU_COMPILE_ATTENTION": "gcu"}
    with tempfile.TemporaryDirectory() as cache:
        ours = [
            in_child("logprobs", {"model": model, "windows": batches, "kv_cache_dtype": k}, Path(cache), **environ)
            for k in kinds
        ]
    theirs = transformers_logprobs(model, batches)
    reference, result = exp_mean(theirs), {"tokens": len(theirs), "transformers": exp_mean(theirs)}
    for name, found in zip(kinds, ours, strict=True):
        result[name] = {
            "perplexity": exp_mean(found),
            "ratio": exp_mean(found) / reference,
            "mean_abs_logprob_difference": sum(abs(x - y) for x, y in zip(found, theirs, strict=True)) / len(found),
        }
    if kind != "auto":
        result[f"ratio_{kind}_to_auto"] = result[kind]["perplexity"] / result["auto"]["perplexity"]
    print(result)
    return result


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("greedy", "perplexity"))
    parser.add_argument("model")
    parser.add_argument("docs", nargs="?")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--kv-cache-dtype", default="auto", help="of our engine: auto or int8")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.task == "greedy":
        result = greedy(arguments.model)
    elif arguments.docs is None:
        parser.error("perplexity needs DOCS.jsonl")
    else:
        result = perplexity(arguments.model, arguments.docs, arguments.windows, arguments.kv_cache_dtype)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
