"""Everything of vLLM's that `vllm_integration` changes or leans on is still where it was: an upgrade's first test."""

import contextlib
import importlib
import inspect
import subprocess
import sys

import pytest

pytestmark = pytest.mark.vllm


def test_engine_args_have_what_we_edit():
    from vllm.engine.arg_utils import EngineArgs

    names = inspect.signature(EngineArgs).parameters
    assert {"disable_log_stats", "async_scheduling", "enable_chunked_prefill", "additional_config"} <= set(names)
    fill = EngineArgs._set_default_chunked_prefill_and_prefix_caching_args
    assert list(inspect.signature(fill).parameters) == ["self", "model_config"]


def test_error_dump_has_the_arguments_that_ours_takes():
    from vllm.v1.engine import core

    from vllm_integration.behaviours import no_dump

    original = getattr(core.dump_engine_exception, "__gcu_original__", core.dump_engine_exception)
    assert len(inspect.signature(original).parameters) == len(inspect.signature(no_dump).parameters)


def test_compiler_and_pass_manager_override_what_exists():
    from vllm.compilation.compiler_interface import InductorStandaloneAdaptor
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config.compilation import PassConfig

    from vllm_integration import compilation, compiler

    pairs = ((compiler.GcuCompiler, InductorStandaloneAdaptor), (compiler.GcuPassManager, PostGradPassManager))
    for ours, theirs in pairs:
        for name, member in vars(ours).items():
            if inspect.isfunction(member) and name != "__init__":
                assert hasattr(theirs, name), f"{theirs.__name__} has no {name}"
    assert set(compilation.DEVICE_FUSIONS) <= set(PassConfig.__dataclass_fields__)


def test_watcher_acts_once_after_the_import(monkeypatch):
    from vllm_integration import vllm_private

    seen = []
    before = list(sys.meta_path)
    watcher = vllm_private._Watcher("not_there_yet", lambda: seen.append(1))
    sys.meta_path.insert(0, watcher)
    assert watcher.find_spec("anything") is None and not seen
    monkeypatch.setitem(sys.modules, "not_there_yet", inspect)
    watcher.find_spec("anything")
    watcher.find_spec("anything")
    assert seen == [1] and sys.meta_path == before


def test_one_server_module_has_what_we_wrap():
    from vllm_integration import versions

    found = []
    for name in versions.SERVERS:
        with contextlib.suppress(ModuleNotFoundError):
            found.append(importlib.import_module(name))
    (entry,) = [module for module in found if hasattr(module, "serve_http")]
    original = getattr(entry.serve_http, "__gcu_original__", entry.serve_http)
    assert next(iter(inspect.signature(original).parameters)) == "app"
    assert "app.state.engine_client" in inspect.getsource(inspect.getmodule(original))


def test_a_page_has_room_for_what_our_kernels_read():
    """Whatever vLLM's release asks for: keys, values and, for int8, two float32 scales of every slot of a head."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    from vllm_integration.attention import INT8, GcuAttentionBackend

    for name, dtype, width in (("auto", torch.bfloat16, 2 * 64), (INT8, torch.int8, 2 * 64 + 8)):
        mode = get_kv_quant_mode(name)
        spec = FullAttentionSpec(block_size=16, num_kv_heads=3, head_size=64, dtype=dtype, kv_quant_mode=mode)
        if hasattr(GcuAttentionBackend, "get_kv_cache_shape"):  # 0.26
            assert GcuAttentionBackend.get_kv_cache_shape(5, 16, 3, 64, name) == (5, 3, 16, width)
        else:
            spec = GcuAttentionBackend.customize_spec(spec)
        assert spec.page_size_bytes == 3 * 16 * width * dtype.itemsize


def test_latent_attention_needs_what_the_newer_release_has(monkeypatch):
    """0.32 hands our backend the projections; 0.26 does not, and is refused with the way on."""
    from vllm.model_executor.layers.attention import mla_attention

    from gcu_compile.errors import UnsupportedFeatureError
    from vllm_integration import versions

    if hasattr(mla_attention, "split_kv_b_proj"):
        versions.need_latent_attention()
        monkeypatch.delattr(mla_attention, "split_kv_b_proj")
    with pytest.raises(UnsupportedFeatureError, match="VLLM_MLA_DISABLE=1"):
        versions.need_latent_attention()


LATE_THREAD = """
import sys, threading, time, types
from vllm_integration import vllm_private

class SyncMPClient:
    def __init__(self):
        self.asked = threading.Event()
        self.output_queue_thread = threading.Thread(target=self.receive, args=(self.asked,), daemon=True)
        self.output_queue_thread.start()
    @staticmethod
    def receive(asked):
        asked.wait()
        time.sleep(0.3)
        print("ended", flush=True)
    def shutdown(self):
        self.asked.set()

module = sys.modules["vllm.v1.engine.core_client"] = types.ModuleType("core_client")
module.SyncMPClient = SyncMPClient
for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
    sys.modules[name] = types.ModuleType(name)
{install}
client = SyncMPClient()
"""


@pytest.mark.parametrize("install", ["vllm_private.end_output_threads_at_exit()", ""])
def test_interpreter_waits_for_the_output_thread(install):
    script = LATE_THREAD.replace("{install}", install)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ("ended\n" if install else "")


def test_client_has_the_thread_that_ours_waits_for():
    from vllm.v1.engine.core_client import SyncMPClient

    init = getattr(SyncMPClient.__init__, "__gcu_original__", SyncMPClient.__init__)
    assert "self.output_queue_thread = Thread(" in inspect.getsource(inspect.unwrap(init))
    assert "timeout" in inspect.signature(SyncMPClient.shutdown).parameters


def test_graphs_are_split_by_the_function_that_we_precede(monkeypatch):
    from vllm.compilation import backends

    from vllm_integration import vllm_private

    original = getattr(backends.split_graph, "__gcu_original__", backends.split_graph)
    assert list(inspect.signature(original).parameters) == ["graph", "splitting_ops"]
    assert "split_graph(graph, fx_split_ops)" in inspect.getsource(backends.VllmBackend)
    monkeypatch.setattr(backends, "split_graph", lambda graph, splitting_ops: ("split", graph, splitting_ops))
    seen = []
    vllm_private.before_splitting(seen.append)
    assert backends.split_graph("graph", ["op"]) == ("split", "graph", ["op"]) and seen == ["graph"]


def test_attention_after_a_write_of_its_own_does_not_need_the_keys():
    import torch
    from vllm.model_executor.layers.attention import attention

    from vllm_integration.cache_write import keys_from_the_cache

    assert list(inspect.signature(attention.unified_kv_cache_update).parameters) == ["key", "value", "layer_name"]
    graph = torch.fx.Graph()
    query, key, value, output = map(graph.placeholder, ("query", "key", "value", "output"))
    for writes in (True, False):
        token = graph.call_function(torch.ops.vllm.unified_kv_cache_update, (key, value, "a")) if writes else None
        arguments, named = (query, key, value, output, "a"), {"kv_cache_dummy_dep": token}
        graph.call_function(torch.ops.vllm.unified_attention_with_output, arguments, named)
    keys_from_the_cache(torch.fx.GraphModule({}, graph))
    first, second = (n for n in graph.nodes if n.target is torch.ops.vllm.unified_attention_with_output)
    assert first.args == (query, value, value, output, "a") and second.args == (query, key, value, output, "a")
