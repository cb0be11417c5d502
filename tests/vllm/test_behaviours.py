"""The seven behaviours, as functions here and in a running V1 engine with spawned processes below."""

import argparse
import os
import subprocess
import sys
import types

import pytest
from engine import SMALL, run
from tiny import save_llama

from gcu_compile.errors import UnsupportedFeatureError
from vllm_integration import behaviours

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def defaults(model, tmp_path_factory):
    """A running engine with the defaults, asked in its own process and inside a worker process."""
    words = {"enforce_eager": True, "distributed_executor_backend": "mp"}
    request = {"llm": {"model": model, **SMALL, **words}, "probe": True}
    return run(tmp_path_factory.mktemp("defaults"), request)


@pytest.fixture(scope="module")
def overridden(model, tmp_path_factory):
    """An engine that holds its worker, with the user's word against behaviours 1, 5 and 7."""
    words = {"enforce_eager": True, "enable_chunked_prefill": False, "disable_log_stats": False}
    request = {"llm": {"model": model, **SMALL, **words}, "probe": True}
    environ = {"GCU_COMPILE_DUMP_ON_ERROR": "1", "VLLM_NO_USAGE_STATS": "0"}
    return run(tmp_path_factory.mktemp("overridden"), request, **environ)


# (1) statistics
def test_statistics_are_off_in_engine_and_workers(defaults):
    assert defaults["engine"]["log_stats"] is False, defaults["log"]
    assert [worker["usage_stats"] for worker in defaults["workers"]] == [False]


def test_statistics_can_be_switched_on(overridden):
    assert overridden["engine"]["log_stats"] is True, overridden["log"]


def test_first_engine_args_of_a_process_has_the_defaults():
    code = """
from vllm import AsyncEngineArgs, AsyncLLMEngine
args = AsyncEngineArgs(model="m")
print("STATS OFF", args.disable_log_stats, "ASYNC", args.async_scheduling)
"""
    for environ, expected in (({}, "STATS OFF True ASYNC False"), ({"VLLM_PLUGINS": ""}, "STATS OFF False ASYNC None")):
        env = {**os.environ, **environ}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert expected in out.stdout, out.stderr[-2000:]


def test_explicit_argument_beats_the_statistics_default():
    kwargs = {"disable_log_stats": False}
    behaviours.edit_engine_args(kwargs)
    assert kwargs["disable_log_stats"] is False


@pytest.mark.parametrize(("words", "disabled"), [([], True), (["--enable-log-stats"], False)])
def test_statistics_on_the_command_line(words, disabled):
    parser = argparse.ArgumentParser()
    parser.add_argument("--disable-log-stats", action="store_true")
    behaviours.extend_parser(parser)
    assert parser.parse_args(words).disable_log_stats is disabled


# (2) asynchronous output processing
def test_async_scheduling_is_off_in_engine_and_workers(defaults):
    assert defaults["engine"]["async_scheduling"] is False
    assert [worker["async_scheduling"] for worker in defaults["workers"]] == [False]


# (3) spawn
def test_engine_and_workers_are_spawned_processes(defaults):
    assert [worker["start_method"] for worker in defaults["workers"]] == ["spawn"]
    assert all(worker["pid"] != defaults["pid"] for worker in defaults["workers"])


def test_fork_is_refused(model, tmp_path):
    request = {"llm": {"model": model, **SMALL, "enforce_eager": True}}
    reply = run(tmp_path, request, VLLM_WORKER_MULTIPROC_METHOD="fork")
    assert "VLLM_WORKER_MULTIPROC_METHOD=fork is not supported" in reply["error"]
    assert "'spawn'" in reply["error"]


def test_other_start_methods_are_refused_too(monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "forkserver")
    with pytest.raises(UnsupportedFeatureError, match="METHOD=forkserver is not supported.*'spawn'"):
        behaviours.refuse_fork()
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    behaviours.refuse_fork()


def test_lone_worker_computes_in_the_engines_process_and_on_every_core(defaults, overridden):
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    (inside,), (outside,) = overridden["workers"], defaults["workers"]
    assert inside["parent"] == overridden["pid"], overridden["log"]
    assert outside["parent"] != defaults["pid"], defaults["log"]
    allowed = get_allowed_cpu_list()
    node = [core for core in allowed if core.numa_node == allowed[0].numa_node]
    assert inside["threads"] == len(inside["cores"]) == len({core.physical_core for core in node})


# (4) original precision
def test_post_processing_precision_is_the_models_own():
    from gcu_compile.options import resolve

    assert behaviours.POST_PROCESSING_DTYPE == resolve({}, {}).post_processing_dtype == "original"
    assert resolve({"post_processing_dtype": "float32"}, {}).post_processing_dtype == "float32"


# (5) chunked prefill
@pytest.mark.parametrize(
    ("length", "asked", "result"),
    [
        (32 * 1024, None, None),  # None: left to vLLM, which turns it on
        (32 * 1024 + 1, None, False),
        (131072, None, False),
        (131072, True, True),
        (2048, False, False),
    ],
)
def test_chunked_prefill_by_length(length, asked, result):
    args = types.SimpleNamespace(enable_chunked_prefill=asked)
    behaviours.default_chunked_prefill(args, types.SimpleNamespace(max_model_len=length))
    assert args.enable_chunked_prefill is result


def test_chunked_prefill_is_on_for_short_models_inside_the_worker(defaults, overridden):
    assert [worker["chunked_prefill"] for worker in defaults["workers"]] == [True]
    assert [worker["chunked_prefill"] for worker in overridden["workers"]] == [False]


def test_chunked_prefill_is_off_for_long_models_inside_the_worker(model, tmp_path):
    long = save_llama(tmp_path / "long", max_position_embeddings=65536)
    request = {"llm": {"model": str(long), **SMALL, "max_model_len": 40000, "enforce_eager": True}, "probe": True}
    reply = run(tmp_path, request)
    assert [worker["chunked_prefill"] for worker in reply.get("workers", [])] == [False], reply["log"]
    assert "Chunked prefill is off by default above 32768 tokens" in reply["log"]


# (6) multi-step scheduling
@pytest.mark.parametrize("where", ["keyword", "additional_config"])
def test_multi_step_is_refused(model, tmp_path, where):
    steps = {"num_scheduler_steps": 8}
    llm = {"model": model, **SMALL, **(steps if where == "keyword" else {"additional_config": steps})}
    reply = run(tmp_path, {"llm": llm})
    assert "multi-step scheduling (num_scheduler_steps=8) is not supported" in reply["error"]


def test_multi_step_on_the_command_line(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--disable-log-stats", action="store_true")
    behaviours.extend_parser(parser)
    assert parser.parse_args(["--num-scheduler-steps", "1"]).num_scheduler_steps == 1
    with pytest.raises(SystemExit):
        parser.parse_args(["--num-scheduler-steps", "4"])
    assert "multi-step scheduling (num_scheduler_steps=4) is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [None, 0, 1])
def test_one_step_is_no_request(steps):
    behaviours.refuse_multi_step({"num_scheduler_steps": steps})


def test_unit_refusal_names_the_remedy():
    with pytest.raises(UnsupportedFeatureError, match=r"Remove it.*Speculative decoding"):
        behaviours.refuse_multi_step({"multi_step_stream_outputs": True})


# (7) no dump
def test_no_dump_of_inputs_inside_the_engine_process(defaults, overridden):
    assert [worker["error_dump_replaced"] for worker in defaults["workers"]] == [True]
    assert [worker["error_dump_replaced"] for worker in overridden["workers"]] == [False]


# Without the plugin
def test_stock_vllm_is_untouched(model, tmp_path):
    request = {"llm": {"model": model, **SMALL, "enforce_eager": True}, "probe": True}
    reply = run(tmp_path, request, VLLM_PLUGINS="")
    (worker,) = reply["workers"]
    assert worker["platform"] == "CpuPlatform" and not worker["error_dump_replaced"]
