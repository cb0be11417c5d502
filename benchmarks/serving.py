"""`vllm serve` under concurrent streaming clients: gcu-compile against stock vLLM, in turns.

    python benchmarks/serving.py MODEL [--json FILE] [--clients 32] [--requests 200] [--tokens 32]

Every stream must be complete and equal to the offline greedy answer in float32, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

PROMPTS = [
    f"Question {n}: name {thing} and say why it matters.\nAnswer:"
    for n, thing in enumerate(("a river", "a metal", "a composer", "a prime number", "a planet", "a tree", "a dance"))
]
LENGTH = 1024


def offline(model: str, tokens: int) -> None:
    """Child: the greedy answer to each prompt, as JSON on the last line."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", max_model_len=LENGTH, kv_cache_memory_bytes=1 << 30)
    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    print("RESULT " + json.dumps([out.outputs[0].text for out in llm.generate(PROMPTS, asked, use_tqdm=False)]))


def stream(address: str, model: str, number: int, tokens: int) -> dict:
    """One streamed completion: its text, finish reason, seconds to the first token and in all."""
    client = OpenAI(base_url=address, api_key="none", max_retries=0)
    begin, first, parts, reason = time.perf_counter(), None, [], None
    for part in client.completions.create(
        model=model,
        prompt=PROMPTS[number % len(PROMPTS)],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        first = first or time.perf_counter() - begin
        parts.append(part.choices[0].text)
        reason = part.choices[0].finish_reason or reason
    return {"text": "".join(parts), "reason": reason, "first_s": first, "all_s": time.perf_counter() - begin}


def serve(model: str, caches: Path, stock: bool, arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Figures of one server, and what its streams said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/v1"
    words = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--port", str(port), "--host", "127.0.0.1"]
    words += ["--dtype", "float32", "--max-model-len", str(LENGTH), "--kv-cache-memory-bytes", str(1 << 30)]
    log = caches / "server.log"
    with log.open("w") as sink:
        server = subprocess.Popen(words, stdout=sink, stderr=sink, env=environment(caches, stock))
    try:
        while True:
            if server.poll() is not None:
                raise SystemExit(f"the server ended:\n{log.read_text()[-3000:]}")
            try:
                name = OpenAI(base_url=address, api_key="none", max_retries=0).models.list().data[0].id
                break
            except Exception:  # not up yet
                time.sleep(0.5)
        stream(address, name, 0, arguments.tokens)
        begin = time.perf_counter()
        with ThreadPoolExecutor(arguments.clients) as pool:
            said = list(pool.map(lambda n: stream(address, name, n, arguments.tokens), range(arguments.requests)))
        seconds = time.perf_counter() - begin
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    figures = {
        "tok_s": arguments.requests * arguments.tokens / seconds,
        "first_token_s": statistics.median(one["first_s"] for one in said),
        "request_s": statistics.median(one["all_s"] for one in said),
        "exit_status": status,
    }
    return figures, said


def environment(caches: Path, stock: bool) -> dict[str, str]:
    env = {
        **os.environ,
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    return env | {"VLLM_PLUGINS": ""} if stock else env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return offline(arguments.model, arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("gcu", "stock")}
        for place in places.values():
            place.mkdir()
        words = [sys.executable, __file__, "--child", arguments.model, "--tokens", str(arguments.tokens)]
        child = subprocess.run(words, env=environment(places["gcu"], False), capture_output=True, text=True)
        if "RESULT " not in child.stdout:
            raise SystemExit(f"the offline run failed:\n{child.stderr[-3000:]}")
        expected = json.loads(child.stdout.rpartition("RESULT ")[2].splitlines()[0])
        ours, said = serve(arguments.model, places["gcu"], False, arguments)
        theirs, _ = serve(arguments.model, places["stock"], True, arguments)
    incomplete = [n for n, one in enumerate(said) if one["reason"] != "length"]
    different = [n for n, one in enumerate(said) if one["text"] != expected[n % len(PROMPTS)]]
    print(f"{len(said)} streams, {len(incomplete)} incomplete, {len(different)} unlike offline greedy")
    print("| | ours | stock | ratio |\n|---|--:|--:|--:|")
    for name, better in (("tok_s", 1), ("first_token_s", -1), ("request_s", -1)):
        print(f"| {name} | {ours[name]:.3f} | {theirs[name]:.3f} | {(ours[name] / theirs[name]) ** better:.2f} |")
    print(f"exit status on SIGTERM: ours {ours['exit_status']}, stock {theirs['exit_status']}")
    if arguments.json:
        report = {"ours": ours, "stock": theirs, "incomplete": incomplete, "different": different}
        arguments.json.write_text(json.dumps(report, indent=1))
    if incomplete or different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
