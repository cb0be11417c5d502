"""The one module that touches private torch and Inductor APIs (torch 2.11 to 2.13)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._functorch._aot_autograd import autograd_cache
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

try:
    from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass
except ImportError:  # torch 2.11, whose passes are not told whether the graph is trained
    CustomInferenceAwareGraphPass = CustomGraphPass

__all__ = [
    "CustomInferenceAwareGraphPass",
    "Generated",
    "compile_eagerly",
    "compile_with_inductor",
    "first_frame",
    "graph_breaks",
    "inductor_settings",
    "is_wrapper",
    "last_frame",
    "learning",
    "phase_seconds",
    "remember_isa_probes",
    "symbolic_dispatch",
    "symbol_range",
    "triton_version",
    "without_modes",
]

# `torch._inductor.compile_fx` as an attribute may be the function of that name.
compile_fx_module = importlib.import_module("torch._inductor.compile_fx")
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
# Inductor settings that say where or how to look, not what code to make.
NOT_CODE = ("trace.", "fx_graph_", "compile_threads", "worker_", "autotune_local_cache", "autotune_remote_cache")


@dataclass(frozen=True)
class Generated:
    """What Inductor made of one graph.

    Attributes:
        code: source text of its wrapper, kernels included.
        graph: the graph after Inductor's own post-grad passes.
        provenance: kernel call, numbered as in the wrapper's comments -> the nodes that it computes; empty unless
            asked for.
    """

    code: str
    graph: torch.fx.Graph
    provenance: dict[str, list[str]]


def triton_version() -> str:
    """Of the installed Triton; "none" without one."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def graph_breaks() -> Counter[str]:
    """Dynamo's graph breaks in this process so far: reason -> occurrences."""
    from torch._dynamo.utils import counters

    return Counter({str(reason).strip().splitlines()[0]: n for reason, n in counters["graph_break"].items()})


def inductor_settings() -> dict[str, str]:
    """Inductor's settings that differ from their defaults and that code may depend on, as text."""
    config = torch._inductor.config
    changed = {
        name: value
        for name, entry in config._config.items()
        if not name.startswith(NOT_CODE) and (value := getattr(config, name)) != entry.default
    }
    return {name: str(value) for name, value in sorted(changed.items())}


def symbol_range(size: torch.SymInt) -> str:
    """What is known of the symbols in a size, e.g. `s0: [2, 4096]`."""
    ranges = getattr(size.node.shape_env, "var_to_range", {})
    symbols = sorted(size.node.expr.free_symbols, key=str)
    return ", ".join(f"{s}: [{ranges[s].lower}, {ranges[s].upper}]" for s in symbols if s in ranges)


def symbols_of(size: int | torch.SymInt) -> set:
    """The symbols in a size; none in a number."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def size_at(size: int | torch.SymInt, numbers: dict) -> int:
    """A size where its symbols have these numbers. Adds no guard."""
    return int(size.node.expr.xreplace(numbers)) if isinstance(size, torch.SymInt) else size


def hint_of(size: int | torch.SymInt) -> int | None:
    """What a size was when it was traced, if it is a number or one lone symbol that has a hint."""
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.hint if size.node.expr.is_Symbol and size.node.has_hint() else None


def first_frame(stack_trace: str) -> str:
    """`model.py:12 forward`: the outermost place of a node's stack trace."""
    found = FRAME.search(stack_trace)
    return f"{found[1].rsplit('/', 1)[-1]}:{found[2]} {found[3]}" if found else ""


def last_frame(stack_trace: str) -> tuple[str, int, str]:
    """("model.py", 12, "return x * 2"): the innermost place of a node's stack trace, and its line of code."""
    found = list(FRAME.finditer(stack_trace))
    if not found:
        return "", 0, ""
    code = stack_trace[found[-1].end() :].lstrip("\n").splitlines()
    return found[-1][1].rsplit("/", 1)[-1], int(found[-1][2]), code[0].strip() if code else ""


def remember_isa_probes() -> None:
    """Let a process take an earlier one's word that a probe of the vector instructions can be loaded.

    Inductor asks a child process that question once per process and instruction set: 0.8 s on two cores, half the
    time of loading a compiled model. The answer lies beside the probe's library, whose name tells compiler, flags
    and torch; a library that could not be loaded is asked again. Idempotent; nothing happens where torch has no such
    probe (before 2.12).
    """
    from torch._inductor.cpu_vec_isa import VecISA

    probe = getattr(VecISA, "_probe_load", None)
    if probe is None or hasattr(probe, "__wrapped__"):
        return

    @functools.wraps(probe)
    def remembered(isa: Any, library: str) -> bool:
        mark = Path(f"{library}.loads")
        if mark.exists() and mark.stat().st_mtime >= Path(library).stat().st_mtime:
            return True
        loads = probe(isa, library)
        if loads:
            with contextlib.suppress(OSError):  # an unwritable cache is asked each time
                mark.touch()
        return loads

    VecISA._probe_load = remembered


def phase_seconds() -> dict[str, float]:
    """Seconds spent so far in each part of compilation behind Dynamo; the parts do not overlap."""
    from torch._dynamo.utils import compilation_time_metrics as times

    def spent(*names: str) -> float:
        return sum(sum(times.get(name, ())) for name in names)

    ours = spent("pass.joint_graph_passes.joint_custom_pre_pass")
    passes = spent("_recursive_pre_grad_passes", "_recursive_joint_graph_passes", "_recursive_post_grad_passes")
    code = spent("GraphLowering.codegen")
    return {
        "AOTAutograd": spent("create_aot_dispatcher_function") - spent("compile_fx.<locals>.fw_compiler_base"),
        "lowering": ours,
        "Inductor passes": passes - ours,
        "Inductor scheduling and codegen": spent("GraphLowering.run") + code,
        "building and loading code": spent("GraphLowering.compile_to_module") - code,
    }


class BeforeInductorsPasses(CustomGraphPass):
    """Runs `lowering` before any pass of Inductor's, on the graph as AOTAutograd decomposed it.

    Inductor's joint-graph passes run for inference too, and before the post-grad ones. They turn decomposed
    attention into other spellings of SDPA where one of their numbered patterns fits, and split softmaxes of scaled
    scores. From a post-grad pass a rule would meet either form, depending on sizes and versions; from here it meets
    what the model wrote, the same that `compile_eagerly` and a graph without Inductor give.

    Of a graph that needs gradients this is the joint graph, known by its inputs called tangents. It is left alone:
    `lowering` is told of its two parts, forward and backward, when they are apart (`TellsOfTraining`).
    """

    def __init__(self, lowering: CustomInferenceAwareGraphPass):
        self.lowering = lowering
        self.trained = False

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.trained = any(node.op == "placeholder" and "tangents" in str(node.target) for node in graph.nodes)
        if not self.trained:
            self.lowering(graph, is_inference=True)

    def uuid(self) -> Any:
        return self.lowering.uuid()


class TellsOfTraining(CustomInferenceAwareGraphPass):
    """Calls the lowering for the forward and the backward graph of a model that is trained.

    Args:
        first: the pass that met the joint graph of both; torch 2.11 tells this one nothing.
    """

    def __init__(self, first: BeforeInductorsPasses):
        self.first = first

    def __call__(self, graph: torch.fx.Graph, is_inference: bool | None = None) -> None:
        trained = self.first.trained if is_inference is None else not is_inference
        if trained:
            self.first.lowering(graph, is_inference=False)

    def uuid(self) -> Any:
        return self.first.uuid()


def compile_with_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    lowering: Any,
    cache: bool,
    learn: Callable[[Generated], None],
    bypassed: Callable[[str], None],
    provenance: bool = False,
    settings: Mapping[str, Any] | None = None,
):
    """Inductor with `lowering` as the first of its passes on the ATen graph that AOTAutograd made.

    Args:
        lowering: a `CustomInferenceAwareGraphPass`; see `BeforeInductorsPasses` for when it runs.
        cache: whether Inductor keeps and reuses its artifacts.
        learn: called with what was generated for each graph; not called when the cache held the whole.
        bypassed: called with the reason when the cache is not asked although it should be, or cannot keep the code.
        provenance: let Inductor record which nodes each kernel computes.
        settings: Inductor settings that the target needs.
    """
    patches: dict[str, Any] = dict(settings or {})
    if patches.get("use_joint_graph_passes", True):
        first = BeforeInductorsPasses(lowering)
        patches["joint_custom_pre_pass"] = first
        patches["post_grad_custom_pre_pass"] = TellsOfTraining(first)
    else:  # off, they take our pass with them; then the post-grad pre-pass is the first to see the graph
        patches["post_grad_custom_pre_pass"] = lowering
    if not cache:
        patches["fx_graph_cache"] = False
    if provenance:
        patches["trace.provenance_tracking_level"] = 1

    def compile_and_learn(graph_module: torch.fx.GraphModule, inputs: Any, **kwargs: Any):
        result = compile_fx_inner(graph_module, inputs, **kwargs)
        _learn_from(result, graph_module, learn)
        return result

    with telling_bypasses(bypassed) if cache else contextlib.nullcontext():
        return compile_fx(gm, example_inputs, inner_compile=compile_and_learn, config_patches=patches)


@contextlib.contextmanager
def telling_bypasses(tell: Callable[[str], None]) -> Iterator[None]:
    """Call `tell` with the reason where a graph compiled inside goes past AOTAutograd's cache.

    That cache alone saves the lowering: Inductor's own is asked with the lowered graph.
    """
    original, counts = autograd_cache.autograd_cache_key, torch._dynamo.utils.counters["aot_autograd"]
    before, asked, told = Counter(counts), False, False

    def key(*args: Any, **kwargs: Any):
        nonlocal asked, told
        asked = True
        try:
            return original(*args, **kwargs)
        except Exception as error:
            told = True
            reason = re.sub(r" at 0x[0-9a-f]+", "", str(error).strip().splitlines()[0]).rstrip(". ")
            tell(f"AOTAutograd's cache was bypassed: {reason}")
            raise

    with mock.patch.object(autograd_cache, "autograd_cache_key", key):
        yield
    if not asked:
        tell("AOTAutograd's cache is switched off")
    elif not told and counts["autograd_cache_bypass"] > before["autograd_cache_bypass"]:
        tell("AOTAutograd's cache could not keep the code; TORCH_LOGS=+aot says why")


def _learn_from(result: Any, graph_module: torch.fx.GraphModule, learn: Callable[[Generated], None]) -> None:
    if code := getattr(result, "source_code", None):  # a graph without operations has none
        mapping = json.loads(getattr(result, "inductor_provenance_mapping_str", None) or "{}")
        learn(Generated(code, graph_module.graph, mapping.get("cppCodeToPost", {})))


@contextlib.contextmanager
def learning(learn: Callable[[Generated], None]) -> Iterator[None]:
    """Call `learn` with what Inductor generates inside, for callers that cannot reach `compile_with_inductor`."""
    original = compile_fx_module.fx_codegen_and_compile

    def generate(graph_module: torch.fx.GraphModule, *args: Any, **kwargs: Any):
        result = original(graph_module, *args, **kwargs)
        _learn_from(result, graph_module, learn)
        return result

    with mock.patch.object(compile_fx_module, "fx_codegen_and_compile", generate):
        yield


def compile_eagerly(gm: torch.fx.GraphModule, example_inputs: list[Any], lowering: Any):
    """Decompose as Inductor would, run `lowering`, and interpret the result: no code is generated."""

    def inference(graph_module: torch.fx.GraphModule, inputs: list[Any]):
        lowering(graph_module.graph, is_inference=True)
        graph_module.recompile()
        return make_boxed_func(graph_module.forward)

    def training(graph_module: torch.fx.GraphModule, inputs: list[Any]):
        lowering(graph_module.graph, is_inference=False)
        return make_boxed_func(graph_module.forward)

    return aot_module_simplified(
        gm,
        example_inputs,
        fw_compiler=training,
        bw_compiler=training,
        inference_compiler=inference,
        decompositions=select_decomp_table(),
    )


def symbolic_dispatch():
    """A context in which fake operations keep symbolic sizes: torch 2.11's C++ `matmul` asks for numbers, its
    decomposition does not."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def without_modes():
    """A context in which tensors are real, whatever modes (fake tensors, tracing) are on around it."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()
