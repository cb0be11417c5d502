"""A model compiled for a card that is not here: kernels, what the checker says of each, and predicted times.

    result = cross_compile(read_config("model"), "gcu300", lowering=lambda: LoweringPass(options, "gcu300"))
    result["graphs"]["decode"]["totals"]["microseconds"]
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from gcu_compile.codegen import cross_private, device, models, sources_private
from gcu_compile.errors import InvalidValueError, KernelBuildError, UnknownNameError
from gcu_compile.targets.cost import predict
from gcu_compile.targets.cost_calls import is_view, predict_call
from gcu_compile.targets.legality import Specimen, check_ttir, ttir_of
from gcu_compile.targets.profile import Profile
from gcu_compile.targets.ttir import parse

GRAPHS = ("prefill", "decode")
WIDE = ("no-64-bit-values", "no-64-bit-index")
WRONG = ("strided-reduction-block", "transposed-tile")
ELEMENTS = {
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
}


def cross_compile(
    config: Any,
    target: str,
    *,
    lowering: Callable[[], Any],
    batch: int = 1,
    tokens: int = 2048,
    weights: str = "bf16",
    graphs: Sequence[str] = GRAPHS,
    baseline: bool = False,
    profile_file: str = "",
) -> dict[str, Any]:
    """Compile the prefill and decode graphs of a model.

    Args:
        config: transformers' config (`models.read_config`).
        lowering: makes the pass that lowers one graph; None from it: Inductor alone.
        batch: sequences. tokens: length of the prompt; decode has a cache of that length.
        weights: one of `models.FORMATS`.
        graphs: which of `GRAPHS`.
        baseline: also the same graphs through Inductor's own Triton scheduling, without our lowering.
        profile_file: YAML that overrides facts of the target.

    Raises:
        UnknownNameError: no such target, graph or weight format.
        UnsupportedFeatureError: a model that transformers lacks, or that is not one graph.
    """
    for name in graphs:
        if name not in GRAPHS:
            raise UnknownNameError("graph", name, GRAPHS)
    if weights not in models.FORMATS:
        raise UnknownNameError("weight format", weights, models.FORMATS)
    for what, number in (("batch", batch), ("tokens", tokens)):
        if number < 1:
            raise InvalidValueError(what, number, "a positive number")
    profile = device.register(target, profile_file).profile
    result: dict[str, Any] = {"target": target, "batch": batch, "tokens": tokens, "weights": weights, "graphs": {}}
    with cross_private.fake_mode():
        model = models.build(config, weights)
        result["parameters"] = sum(p.numel() for p in model.parameters())
        for name in graphs:
            start = time.perf_counter()
            arguments = models.step(model, batch, tokens if name == "prefill" else 1, tokens)
            gm, inputs = cross_private.capture(model, arguments)
            stock = cross_private.generate(gm, inputs, stock=True) if baseline else None
            captured = time.perf_counter()
            made = cross_private.generate(gm, inputs, lowering())
            generated = time.perf_counter()
            entry = inspect(made, profile)
            if stock is not None:
                entry["baseline"] = inspect(stock, profile)
            done = time.perf_counter()
            seconds = {"capture": captured - start, "generate": generated - captured, "check": done - generated}
            entry["seconds"] = seconds
            result["graphs"][name] = entry
    return result


def inspect(made: cross_private.GeneratedGraph, profile: Profile) -> dict[str, Any]:
    """Kernels, calls and totals of one generated graph."""
    launches = Counter(c.target for c in sources_private.calls_of(made.source) if c.kind == "triton")
    kernels = [_kernel(k, launches[k.name], profile) for k in sources_private.kernels_of(made.source).values()]
    calls = [_call(extern, count, profile) for extern, count in Counter(made.externs).items()]
    return {"wrapper": made.source, "kernels": kernels, "calls": calls, "totals": totals(kernels, calls)}


def _kernel(kernel: Any, launches: int, profile: Profile) -> dict[str, Any]:
    types = {name: kind for name, kind in kernel.signature.items() if name not in kernel.constexprs}
    specimen = Specimen(
        kernel.function,
        {name: kind for name, kind in types.items() if kind != "constexpr"},
        kernel.constexprs,
        kernel.grid,
        kernel.num_warps,
        kernel.num_stages,
        kernel.values,
        kernel.name,
    )
    entry = {
        "name": kernel.name,
        "launches": launches,
        "grid": list(kernel.grid),
        "num_warps": kernel.num_warps,
        "constexprs": kernel.constexprs,
        "triton": kernel.text,
    }
    try:
        text = ttir_of(specimen, profile)
    except KernelBuildError as error:
        return entry | {"ttir": "", "error": str(error), "report": None, "cost": None}
    module = parse(text)
    report = check_ttir(module, profile, specimen.launch, kernel.name)
    # The grid is one launch; a loop over tiles is counted for program 0, whose share is the largest.
    cost = predict(module, profile, specimen.launch, _known(module, kernel.values), launches)
    return entry | {"ttir": text, "error": "", "report": report.as_dict(), "cost": cost.as_dict()}


def _known(module: Any, values: dict[str, int]) -> dict[str, int]:
    """The values of those arguments that the kernel still has."""
    names = {argument.name.lstrip("%") for argument in module.function.arguments}
    return {name: value for name, value in values.items() if name in names}


def _call(extern: cross_private.Extern, count: int, profile: Profile) -> dict[str, Any]:
    inputs, outputs = (
        [(shape, dtype.itemsize, ELEMENTS.get(dtype, str(dtype))) for shape, dtype in part]
        for part in (extern.inputs, extern.outputs)
    )
    cost = predict_call(extern.target, inputs, outputs, profile, count)
    shapes = {"inputs": [[list(s), e] for s, _, e in inputs], "outputs": [[list(s), e] for s, _, e in outputs]}
    return {"target": extern.target, "count": count, "view": is_view(extern.target), **shapes, "cost": cost.as_dict()}


def totals(kernels: Iterable[dict[str, Any]], calls: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums over a graph: times, traffic, and how many of each kind of finding.

    dma_share: of the bytes that generated kernels move, those that move as DMA slices.
    """
    kernels, calls = list(kernels), list(calls)
    costs = [k["cost"] for k in kernels if k["cost"]]
    findings = Counter(f["rule"] for k in kernels if k["report"] for f in k["report"]["findings"])
    severities = Counter(f["severity"] for k in kernels if k["report"] for f in k["report"]["findings"])
    moved = sum(c["bytes_read"] + c["bytes_written"] for c in costs)
    gathered = sum(c["gathered_bytes"] for c in costs)
    everything = [*costs, *(c["cost"] for c in calls)]
    return {
        "kernels": len(kernels),
        "kernel_launches": sum(k["launches"] for k in kernels),
        "calls": sum(c["count"] for c in calls if not c["view"]),
        "microseconds": sum(c["microseconds"] for c in everything),
        "launch_microseconds": sum(c["times"]["launch"] for c in everything),
        "bytes": sum(c["bytes_read"] + c["bytes_written"] for c in everything),
        "kernel_bytes": moved,
        "gathered_bytes": gathered,
        "dma_share": 1.0 - gathered / moved if moved else 1.0,
        "errors": severities["error"] + sum(bool(k["error"]) for k in kernels),
        "aborts": severities["abort"],
        "wide": sum(findings[rule] for rule in WIDE),
        "known_wrong": sum(findings[rule] for rule in WRONG),
        "bounds": dict(Counter(c["bound"] for c in everything)),
        "gathers": [
            {"kernel": k["name"], "line": a["line"], "shape": a["shape"], "element": a["element"], "why": why(k, a)}
            for k in kernels
            if k["report"]
            for a in k["report"]["accesses"]
            if a["verdict"] == "gather"
        ],
    }


def why(kernel: dict[str, Any], access: dict[str, Any]) -> str:
    """What the checker says about one access that is no slice."""
    findings = kernel["report"]["findings"]
    said = [f["message"] for f in findings if f["line"] == access["line"] and f["rule"] in access["reasons"]]
    return "; ".join(said) or ", ".join(access["reasons"])
