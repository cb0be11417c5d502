"""The only module that changes vLLM's own functions, or takes private ones. Each says what it needs that no hook gives.

`tests/vllm/test_vllm_private.py` fails when an upgrade moves or renames one of these.
"""

from __future__ import annotations

import atexit
import functools
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

log = logging.getLogger("vllm.gcu")


def _once(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace `owner.name` by `make(original)`, unless that was done before in this process."""
    original = getattr(owner, name)
    if hasattr(original, "__gcu_original__"):
        return
    wrapper = functools.wraps(original)(make(original))
    wrapper.__gcu_original__ = original
    setattr(owner, name, wrapper)


def on_engine_args(edit: Callable[[dict[str, Any]], None]) -> None:
    """Let `edit` change the keyword arguments of every `EngineArgs(...)`.

    A dataclass keeps its defaults inside the generated `__init__`; changing the class attribute changes
    only the command line's.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    def make(original):
        def __init__(self, *args, **kwargs):
            edit(kwargs)
            original(self, *args, **kwargs)

        return __init__

    for owner in (EngineArgs, AsyncEngineArgs):
        _once(owner, "__init__", make)


class _Watcher:
    """A finder that finds nothing: imports that follow the module `name` call `action`, once."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        module = sys.modules.get(self.name)
        if module is not None and not getattr(module.__spec__, "_initializing", False) and self in sys.meta_path:
            sys.meta_path.remove(self)
            self.action()


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once the module `name` is there: now, or at the first import after its own."""
    watcher = _Watcher(name, action)
    sys.meta_path.insert(0, watcher)
    watcher.find_spec("")


def fail_when_engine_died(server: str) -> None:
    """Let an API server whose engine died end with exit status 1; vLLM's own ends with 0.

    Args:
        server: the module that calls `serve_http`, imported: one of `versions.SERVERS`.
    """
    entry = sys.modules[server]
    if not hasattr(entry, "serve_http"):  # a name kept for old imports
        return

    def make(original):
        async def serve_http(app, *args, **kwargs):
            engine, asked = app.state.engine_client, []
            stop = engine.shutdown

            def shutdown(*args, **kwargs):
                asked.append(True)
                return stop(*args, **kwargs)

            engine.shutdown = shutdown  # called on SIGTERM; an engine that was told to stop did not die
            ending = await original(app, *args, **kwargs)
            if asked or not engine.errored:
                return ending
            await ending
            log.error("The engine process died; the server ends with exit status 1.")
            raise SystemExit(1)

        return serve_http

    _once(entry, "serve_http", make)


# Seconds for which an ending interpreter waits for the engine's last words; an engine that was asked to end
# says them within milliseconds.
OUTPUT_THREAD_PATIENCE = 5.0


def end_output_threads_at_exit() -> None:
    """Let the thread that receives an engine's outputs end before the interpreter does.

    vLLM makes it a daemon. Its last message holds tensors over received memory, whose deleter asks for the
    interpreter's lock; in an interpreter that is ending, Python answers that by ending the thread inside a C++
    destructor, and the process dies with "terminate called without an active exception" after a good run.
    """
    from vllm.v1.engine.core_client import SyncMPClient

    def end(client: weakref.ref, thread: Any) -> None:
        if client() is not None:
            client().shutdown()
        thread.join(OUTPUT_THREAD_PATIENCE)

    def make(original):
        def __init__(self, *args, **kwargs):
            original(self, *args, **kwargs)
            atexit.register(end, weakref.ref(self), self.output_queue_thread)

        return __init__

    _once(SyncMPClient, "__init__", make)


def layer_name_resolver() -> Callable[[Any], str]:
    """What tells the name of a layer from the argument by which compiled graphs hand it to operations."""
    from vllm.utils.torch_utils import _resolve_layer_name

    return _resolve_layer_name


def before_splitting(edit: Callable[[Any], None]) -> None:
    """Call `edit(graph_module)` on a model's whole graph before vLLM splits it for compilation.

    A pass sees one piece, and cannot know who uses what the piece hands on.
    """
    from vllm.compilation import backends

    def make(original):
        def split_graph(graph, splitting_ops):
            edit(graph)
            return original(graph, splitting_ops)

        return split_graph

    _once(backends, "split_graph", make)


def on_chunked_prefill_default(decide: Callable[[Any, Any], None]) -> None:
    """Call `decide(engine_args, model_config)` before vLLM fills in `enable_chunked_prefill`.

    Later hooks can no longer tell the user's word from vLLM's default.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make(original):
        def fill(self, model_config):
            decide(self, model_config)
            return original(self, model_config)

        return fill

    _once(EngineArgs, "_set_default_chunked_prefill_and_prefix_caching_args", make)


def replace_error_dump(replacement: Callable) -> None:
    """`replacement(config, scheduler_output, scheduler_stats)` instead of the dump of a failed step's inputs."""
    from vllm.v1.engine import core

    _once(core, "dump_engine_exception", lambda original: replacement)


def cuda_names_mean_gcu() -> None:
    """Let `torch.cuda.Stream`, `Event` and the like be those of `torch.gcu` in this worker process.

    vLLM's model runner asks torch.cuda for its streams on every device. The vendor's `torch_gcu.transfer_to_gcu` does
    the same to all of torch.cuda.
    """
    import torch

    def event(*args: Any, blocking: bool | None = None, **kwargs: Any) -> Any:
        return torch.gcu.Event(*args, **kwargs)

    torch.cuda.Event, torch.cuda.Stream, torch.cuda.stream = event, torch.gcu.Stream, torch.gcu.stream
    # Objects of their own: Dynamo refuses two names for one function.
    for name in ("current_stream", "default_stream", "set_stream"):
        setattr(torch.cuda, name, functools.partial(getattr(torch.gcu, name)))


def skip_kernel_warmup() -> None:
    """No warm-up of vLLM's CUDA kernels, which imports models whose dependencies are not here."""
    from vllm.v1.worker import gpu_worker

    def make(original):
        def kernel_warmup(*args, **kwargs):
            return None

        return kernel_warmup

    _once(gpu_worker, "kernel_warmup", make)


def replace_encoder_attention(attend: Callable) -> None:
    """`attend(q, k, v, scale)` instead of torch's SDPA in the encoders of images and sound.

    Their layers choose among vLLM's own backends only; all of them on the CPU come to this function.
    """
    from vllm.v1.attention.ops import vit_attn_wrappers

    def make(original):
        def apply_sdpa(q, k, v, scale=None, enable_gqa=False):
            return attend(q, k, v, scale)

        return apply_sdpa

    _once(vit_attn_wrappers, "apply_sdpa", make)


def replace_linear(prepare: Callable) -> None:
    """`prepare(layer, remove_weight)` for each unquantised layer on the CPU, before vLLM chooses its product; true: it
    has set `layer.cpu_linear`. No hook stands between a layer and vLLM's own choice."""
    from vllm.model_executor.layers import utils

    def make(original):
        def dispatch_cpu_unquantized_gemm(layer, remove_weight):
            if not prepare(layer, remove_weight):
                original(layer, remove_weight)

        return dispatch_cpu_unquantized_gemm

    _once(utils, "dispatch_cpu_unquantized_gemm", make)


def replace_slot_mapping(compute: Callable) -> None:
    """`compute(block_table, query_start_loc, positions, block_size, out)` instead of a Triton kernel."""
    from vllm.v1.worker.block_table import BlockTable

    def make(original):
        def compute_slot_mapping(self, num_reqs, query_start_loc, positions):
            starts = query_start_loc[: num_reqs + 1]
            compute(self.block_table.gpu, starts, positions, self.block_size, self.slot_mapping.gpu)

        return compute_slot_mapping

    _once(BlockTable, "compute_slot_mapping", make)


def prefer_linear_kernels(mixed_precision: type, int8: type) -> None:
    """Put our kernels first in vLLM's lists for this platform.

    `register_linear_kernel` appends, and the first kernel that can implement a layer is taken.
    """
    from vllm.model_executor.kernels import linear
    from vllm.platforms import current_platform

    for kernels, ours in ((linear._POSSIBLE_KERNELS, mixed_precision), (linear._POSSIBLE_INT8_KERNELS, int8)):
        mine = kernels.setdefault(current_platform._enum, [])
        if ours not in mine:
            mine.insert(0, ours)


def replace_quantization_configs(configs: dict[str, type]) -> None:
    """Name of a method -> our configuration in its place (vLLM's `register_quantization_config` allows it)."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    for name, config in configs.items():
        register_quantization_config(name)(config)
