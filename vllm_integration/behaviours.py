"""The seven behaviours in which this platform differs from stock vLLM, each a named default.

The list is that of the vendor's release notes; `docs/behaviours.md` tells how to override each one.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from gcu_compile.errors import UnsupportedFeatureError
from gcu_compile.options import resolve
from vllm_integration import versions, vllm_private

log = logging.getLogger("vllm.gcu")  # below vLLM's own logger, so that its handlers show it

# (1) No usage telemetry, no periodic engine statistics.
USAGE_STATS_OFF = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
LOG_STATS = False
# (2) Output processing is not asynchronous; in V1 that is asynchronous scheduling.
ASYNC_SCHEDULING = False
# (3) Worker processes are spawned.
MULTIPROC_METHOD = "spawn"
# (4) Post-processing in the precision of the logits: `Options.post_processing_dtype`.
POST_PROCESSING_DTYPE = "original"
# (5) Chunked prefill is on by default up to this sequence length, and off above it.
CHUNKED_PREFILL_MAX_LEN = 32 * 1024
# (6) Names under which multi-step scheduling can be asked for, and the values that ask for nothing.
MULTI_STEP_NAMES = {
    "num_scheduler_steps": ("None", "0", "1"),
    "multi_step_stream_outputs": ("None", "0", "False", "false"),
}
# Names of KV cache dtypes beyond vLLM's, and what vLLM calls them: int8 has a scale per token and head.
KV_CACHE_DTYPES = {"int8": "int8_per_token_head"}
# (7) The inputs of a failed step are not dumped.
DUMP_ON_ERROR = False


def install() -> None:
    """Put the defaults in place in this process and, by the environment, in its children. Idempotent."""
    refuse_fork()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = MULTIPROC_METHOD
    for name, value in USAGE_STATS_OFF.items():
        os.environ.setdefault(name, value)
    install_engine_args()
    vllm_private.on_chunked_prefill_default(default_chunked_prefill)
    for server in versions.SERVERS:
        vllm_private.when_imported(server, functools.partial(vllm_private.fail_when_engine_died, server))
    if not resolve().dump_on_error:
        vllm_private.replace_error_dump(no_dump)


def install_engine_args() -> None:
    """The part of `install` that the first `EngineArgs(...)` of a process must meet already."""
    vllm_private.on_engine_args(edit_engine_args)


def refuse_fork() -> None:
    """Behaviour 3: raise if the user chose fork, or anything but spawn."""
    asked = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", MULTIPROC_METHOD)
    if asked != MULTIPROC_METHOD:
        raise UnsupportedFeatureError(
            f"VLLM_WORKER_MULTIPROC_METHOD={asked} is not supported: device runtimes and OpenMP pools do not survive "
            "a fork. Unset it, or set it to 'spawn' (the default here)."
        )


def edit_engine_args(kwargs: dict[str, Any]) -> None:
    """Behaviours 1, 2 and 6 on the keyword arguments of `EngineArgs`; what the user gave stays."""
    kwargs.setdefault("disable_log_stats", not (LOG_STATS or resolve().log_stats))
    if kwargs.get("async_scheduling") is None:
        kwargs["async_scheduling"] = ASYNC_SCHEDULING
    if kwargs.get("kv_cache_dtype") in KV_CACHE_DTYPES:
        kwargs["kv_cache_dtype"] = KV_CACHE_DTYPES[kwargs["kv_cache_dtype"]]
    refuse_multi_step(kwargs)
    for name in MULTI_STEP_NAMES:
        kwargs.pop(name, None)
    refuse_multi_step(kwargs.get("additional_config"))


def refuse_multi_step(given: Any) -> None:
    """Behaviour 6: raise if `given` asks for multi-step scheduling. One step per schedule is no request; neither is
    None, nor an `additional_config` that is no dict."""
    if not isinstance(given, dict):
        return
    for name, nothing in MULTI_STEP_NAMES.items():
        if str(given.get(name)) not in nothing:
            raise UnsupportedFeatureError(
                f"multi-step scheduling ({name}={given[name]!r}) is not supported. Remove it; each engine step "
                "schedules anew. Speculative decoding also yields several tokens a step (--speculative-config)."
            )


def default_chunked_prefill(engine_args: Any, model_config: Any) -> None:
    """Behaviour 5: without the user's word, no chunked prefill above 32k."""
    if engine_args.enable_chunked_prefill is None and model_config.max_model_len > CHUNKED_PREFILL_MAX_LEN:
        log.info(
            "Chunked prefill is off by default above %d tokens (max_model_len %d); "
            "turn it on with enable_chunked_prefill=True.",
            CHUNKED_PREFILL_MAX_LEN,
            model_config.max_model_len,
        )
        engine_args.enable_chunked_prefill = False


def no_dump(config: Any, scheduler_output: Any, scheduler_stats: Any) -> None:
    """Behaviour 7: say that there is no dump, and how to get one."""
    log.error("A step failed; its inputs are not dumped. Set GCU_COMPILE_DUMP_ON_ERROR=1 to dump them.")


def extend_parser(parser: Any) -> None:
    """The command line's side of behaviours 1 and 6, and of the KV cache dtypes."""
    for action in parser._actions:
        if action.dest == "kv_cache_dtype" and action.choices is not None:
            action.choices = [*action.choices, *(name for name in KV_CACHE_DTYPES if name not in action.choices)]
    known = {option for action in parser._actions for option in action.option_strings}
    if "--enable-log-stats" not in known:
        parser.add_argument(
            "--enable-log-stats",
            dest="disable_log_stats",
            action="store_false",
            help="Log engine statistics, which this platform leaves off.",
        )
    parser.set_defaults(disable_log_stats=not (LOG_STATS or resolve().log_stats))
    if "--num-scheduler-steps" not in known:
        parser.add_argument("--num-scheduler-steps", type=_one_step, help="Not supported; 1 is accepted.")


def _one_step(text: str) -> int:
    from argparse import ArgumentTypeError

    try:
        refuse_multi_step({"num_scheduler_steps": int(text)})
    except UnsupportedFeatureError as error:
        raise ArgumentTypeError(str(error)) from None
    return int(text)
