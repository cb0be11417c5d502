"""Runs vLLM in a process of its own: `python engine.py request.json reply.json`.

The request holds `llm` (keyword arguments of `LLM`), `prompts` (lists of token ids), `sampling` (one for
all, or one each), `beams` (arguments of a beam search over the same prompts), and `probe`.
A spawned child imports this file again, so everything stands behind the `__main__` check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SMALL = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 16, "dtype": "float32"}


def run(folder: Path, request: dict, timeout: float = 400, **environ: str) -> dict:
    """The reply of a fresh process; its caches live in `folder`.

    Returns:
        The script's reply, or {"error": last lines of its output} when it failed; `log` is the whole output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(json.dumps(request))
    (folder / "reply.json").unlink(missing_ok=True)
    env = {
        **os.environ,
        "VLLM_CACHE_ROOT": str(folder / "vllm_cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        **environ,
    }
    words = [sys.executable, __file__, str(folder / "request.json"), str(folder / "reply.json")]
    process = subprocess.run(words, capture_output=True, text=True, env=env, timeout=timeout)
    log = process.stdout + process.stderr
    if process.returncode or not (folder / "reply.json").exists():
        return {"error": log[-6000:], "log": log}
    return {**json.loads((folder / "reply.json").read_text()), "log": log}


def probe_worker(worker) -> dict:
    """What holds inside a worker process."""
    import torch
    from vllm import envs
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.v1.engine import core

    from gcu_compile import backend

    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "start_method": envs.VLLM_WORKER_MULTIPROC_METHOD,
        "usage_stats": not (envs.VLLM_NO_USAGE_STATS or envs.VLLM_DO_NOT_TRACK),
        "error_dump": core.dump_engine_exception.__module__,
        "error_dump_replaced": hasattr(core.dump_engine_exception, "__gcu_original__"),
        "async_scheduling": worker.vllm_config.scheduler_config.async_scheduling,
        "chunked_prefill": worker.vllm_config.scheduler_config.enable_chunked_prefill,
        "compile_backend": str(worker.vllm_config.compilation_config.backend),
        "compile_mode": int(worker.vllm_config.compilation_config.mode),
        "reports": [report.to_json() for report in backend.reports],
        "device": str(worker.device),
        "communicator": type(getattr(get_tp_group(), "device_communicator", None)).__name__,
        "platform": type(__import__("vllm.platforms", fromlist=["x"]).current_platform).__name__,
    }


def sampler_fallbacks(worker) -> dict:
    """Why vLLM's own sampler was used, and how often."""
    return dict(getattr(worker.model_runner.sampler, "fallbacks", {}))


def kernel_calls(worker) -> dict[str, int]:
    """How often which implementation of an operation ran, `linear/host_cpp` and so on."""
    from gcu_compile.kernels import registry

    return {"/".join(key): count for key, count in registry.calls.items()}


def logprobs_of(output) -> list[float]:
    """Log-probabilities of the prompt's own tokens, from the second on; empty where they were not asked for."""
    pairs = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=False)
    return [float(logprobs[token].logprob) for token, logprobs in pairs]


def scores_of(output) -> list[dict[str, list[float]]]:
    """Of each token written, log-probability and rank of the tokens shown with it; empty where not asked for."""
    return [{str(t): [one.logprob, one.rank] for t, one in step.items()} for step in output.outputs[0].logprobs or []]


def main(request_file: str, reply_file: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    request = json.loads(Path(request_file).read_text())
    llm = LLM(**request["llm"])
    config = llm.llm_engine.vllm_config
    reply = {
        "pid": os.getpid(),
        "engine": {
            "log_stats": llm.llm_engine.log_stats,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        },
    }
    if request.get("probe"):
        reply["workers"] = llm.collective_rpc(probe_worker)
    if request.get("prompts"):
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        asked = request["sampling"]
        for one in asked if isinstance(asked, list) else []:
            if "logit_bias" in one:  # JSON has only text for keys
                one["logit_bias"] = {int(token): bias for token, bias in one["logit_bias"].items()}
            if "structured_outputs" in one:
                one["structured_outputs"] = StructuredOutputsParams(**one["structured_outputs"])
        each = [SamplingParams(**one) for one in asked] if isinstance(asked, list) else SamplingParams(**asked)
        outputs = llm.generate(prompts, each, use_tqdm=False)
        reply["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
        reply["all_tokens"] = [[list(one.token_ids) for one in output.outputs] for output in outputs]
        reply["texts"] = [[one.text for one in output.outputs] for output in outputs]
        reply["prompt_logprobs"] = [logprobs_of(output) for output in outputs]
        reply["logprobs"] = [scores_of(output) for output in outputs]
        if request.get("beams"):
            found = llm.beam_search(prompts, BeamSearchParams(**request["beams"]))
            reply["beams"] = [[[beam.tokens, beam.cum_logprob] for beam in output.sequences] for output in found]
        reply["fallbacks"] = llm.collective_rpc(sampler_fallbacks)
        reply["calls"] = llm.collective_rpc(kernel_calls)
    Path(reply_file).write_text(json.dumps(reply))


if __name__ == "__main__":
    main(*sys.argv[1:])
