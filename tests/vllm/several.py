"""Runs several models through vLLM in one process: `python several.py requests.json replies.json`.

Each request holds `llm`, `prompts` and, for models that generate, `sampling`. It may hold `rounds`, how often the
prompts are asked, and `environ`, variables for this engine alone. Each reply holds tokens and the log-probabilities of
the prompts' tokens and of those that were written, or embeddings; which implementation ran how often; and what was
replayed. One process imports vLLM once.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, requests: list[dict], timeout: float = 600, **environ: str) -> list[dict]:
    """The replies of a fresh process; raises with its output if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requests.json").write_text(json.dumps(requests))
    env = {
        **os.environ,
        "VLLM_CACHE_ROOT": str(folder / "vllm_cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        **environ,
    }
    words = [sys.executable, __file__, str(folder / "requests.json"), str(folder / "replies.json")]
    process = subprocess.run(words, capture_output=True, text=True, env=env, timeout=timeout)
    if process.returncode:
        raise AssertionError((process.stdout + process.stderr)[-8000:])
    log = process.stdout + process.stderr
    return [{**reply, "log": log} for reply in json.loads((folder / "replies.json").read_text())]


def calls(worker) -> dict:
    """Operation/implementation -> calls in this worker, and why an operation ran as plain torch."""
    from gcu_compile.kernels import registry

    found = {"/".join(key): count for key, count in registry.calls.items()}
    replay = getattr(worker, "_replay", None)
    return {
        "calls": found,
        "fallbacks": ["/".join(key) for key in registry.fallbacks],
        "replayed": replay and replay.replayed,
        "captured": sorted(replay.captured) if replay else [],
    }


def prompt_of(given) -> dict:
    """What vLLM takes for token ids, for [ids, sizes of an image], or for [ids of the decoder, seconds of sound]."""
    if not given or isinstance(given[0], int):
        return {"prompt_token_ids": given}
    from other_models import RATE, image, sound
    from PIL import Image

    ids, what = given
    if what is None:
        return {"prompt_token_ids": ids}
    if isinstance(what, float):
        heard = {"prompt": "", "multi_modal_data": {"audio": (sound(what), RATE)}}
        return {"encoder_prompt": heard, "decoder_prompt": {"prompt_token_ids": ids}}
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(image(*what))}}


def answer(request: dict) -> dict:
    from vllm import LLM, SamplingParams

    if "image" in request["llm"].get("limit_mm_per_prompt", ()):
        from other_models import without_torchvision

        without_torchvision()
    from gcu_compile.kernels import registry

    os.environ.update(request.get("environ", {}))
    before = registry.calls.copy()
    llm = LLM(**request["llm"])
    prompts, reply = [prompt_of(given) for given in request["prompts"]], {}
    if "sampling" in request:
        for _ in range(request.get("rounds", 1)):
            outputs = llm.generate(prompts, SamplingParams(**request["sampling"]), use_tqdm=False)
        reply["tokens"] = [list(o.outputs[0].token_ids) for o in outputs]
        reply["logprobs"] = [
            [entry[token].logprob for entry, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)]
            for o in outputs
            if o.prompt_logprobs
        ]
        reply["written"] = [
            [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)]
            for one in (o.outputs[0] for o in outputs)
            if one.logprobs
        ]
    else:  # a pooling model
        reply["embeddings"] = [o.outputs.embedding for o in llm.embed(prompts, use_tqdm=False)]
    reply["worker"], *_ = llm.collective_rpc(calls)
    # Of this engine alone, if its worker is in this process.
    reply["ran"] = {"/".join(key): count for key, count in (registry.calls - before).items()}
    reply["kv_cache_dtype"] = llm.llm_engine.vllm_config.cache_config.cache_dtype
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    for name in request.get("environ", {}):
        del os.environ[name]
    return reply


def main(requests: str, replies: str) -> None:
    Path(replies).write_text(json.dumps([answer(request) for request in json.loads(Path(requests).read_text())]))


if __name__ == "__main__":
    main(*sys.argv[1:])
