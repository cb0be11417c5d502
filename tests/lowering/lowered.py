"""Lowers a function without Dynamo and without code generation, and holds the result against float64 eager."""

from __future__ import annotations

import warnings

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import gcu_compile.backend  # noqa: F401  (defines torch.ops.gcu.*)
from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.lowering.context import Context, GraphReport
from gcu_compile.lowering.pipeline import lower
from gcu_compile.options import resolve
from gcu_compile.torch_private import select_decomp_table, symbolic_dispatch

ATTENTION = torch.ops.gcu.attention.default


def lowered(fn, *args, symbolic=False, dims=(0, 2), **options):
    """(graph module, report) of `fn`, decomposed as Inductor does it and lowered for the host.

    Args:
        symbolic: sizes of the dimensions `dims` are symbols.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        fakes = [faked(mode, arg, dims if symbolic else ()) for arg in args]
        with mode, symbolic_dispatch():
            gm = make_fx(torch.func.functionalize(lambda *a: fn(*a)), decomposition_table=select_decomp_table())(*fakes)
    context = Context(resolve(options), "host", GraphReport("host"))
    env = shape_env(gm)
    guards = len(env.guards) if env else 0
    lower(gm, context)
    gm.recompile()
    assert not env or len(env.guards) == guards, "lowering added a guard"
    return gm, context.report


def faked(mode, arg, dims):
    """`arg` as a fake tensor whose sizes in `dims` are symbols."""
    if not isinstance(arg, torch.Tensor):
        return arg
    kinds = [DimDynamic.DUCK if d in dims else DimDynamic.STATIC for d in range(arg.dim())]
    return mode.from_tensor(arg, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def shape_env(gm):
    """Of a graph with symbolic sizes, or None."""
    for node in gm.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.shape_env
    return None


def calls(gm, target):
    """The calls of `target`."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target == target]


def doubled(args):
    """Floats as float64, the rest as it is."""
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check(fn, *args, length=64, scale=None, **given):
    """`lowered`, and its result against `fn` in float64 within the tolerance of the arguments' dtype."""
    gm, report = lowered(fn, *args, **given)
    actual = gm(*args)
    expected = fn(*doubled(args))
    if scale is None:
        finite = expected[expected.isfinite()]
        scale = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    torch.testing.assert_close(
        actual.double(), expected.double(), **tolerance(actual.dtype, length, scale), equal_nan=True
    )
    return gm, report


def statuses(report, rule):
    """(status, reason) of every place where `rule` looked."""
    return [(match.status, match.reason) for match in report.matches if match.rule == rule]
