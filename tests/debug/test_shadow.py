"""The shadow check: right kernels pass, a wrong one is named with layer, rule and shapes, and its inputs are saved."""

import os
import subprocess
import sys

import pytest
import torch

from gcu_compile.debug import shadow
from gcu_compile.errors import GcuCompileError
from gcu_compile.kernels import registry
from gcu_compile.lowering import pipeline
from gcu_compile.lowering.rule import Rule
from gcu_compile.lowering.rules import all_rules

WRONG = {"scale": 1.0}


def define(name, schema, eager, fake, run, **more):
    if name not in registry.OPS:
        kernel = registry.Implementation("kernel", ("cpu",), run)
        registry.register(registry.FusedOp(name, schema, eager, fake, implementations=(kernel,), **more))
    return getattr(torch.ops.gcu, name)


def add_to(cache, x):
    cache.add_(x * WRONG["scale"])


def store_meaning(cache, x):
    cache.add_(x)


def rows(x, size):
    if x.dtype == torch.float64:
        raise GcuCompileError("no float64 here")
    return x.reshape(-1, size).sum(1)


TRIPLE = define(
    "test_triple",
    "(Tensor x) -> Tensor",
    lambda x: x * 3,
    torch.empty_like,
    lambda x: x * 3 * WRONG["scale"],
    accumulation=lambda x: 1,
)
STORE = define(
    "test_store",
    "(Tensor(a!) cache, *, Tensor x) -> ()",
    store_meaning,
    lambda cache, x: None,
    add_to,
    accumulation=lambda cache, x: 1,
)
ROWS = define(
    "test_rows",
    "(Tensor x, int size) -> Tensor",
    rows,
    lambda x, size: x.new_empty(x.numel() // size),
    lambda x, size: x.reshape(-1, size).sum(1),
    accumulation=lambda x, size: size,
)
COUNT = define(
    "test_count",
    "(Tensor x) -> Tensor",
    lambda x: (x > 0).sum(0),
    lambda x: x.new_empty(x.shape[1:], dtype=torch.int64),
    lambda x: (x > 0).sum(0) + int(WRONG["scale"] != 1),
)


class Model(torch.nn.Module):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return TRIPLE(x).sin()

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setitem(WRONG, "scale", 1.0)
    shadow.reset()
    yield
    shadow.disable()
    torch.compiler.reset()


def run(fn, *args, **options):
    torch.compiler.reset()
    return torch.compile(fn, backend="gcu", options={"cache": False, "inductor": False, **options})(*args)


@pytest.mark.parametrize("mode", ["eager", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inductor", [False, True])
def test_a_right_kernel_passes(mode, dtype, inductor):
    run(Model(), torch.randn(3, 5, dtype=dtype), shadow=mode, inductor=inductor)
    found = shadow.statistics()
    assert [(f.op, f.implementation, f.layer, f.calls, f.breaches) for f in found] == [
        ("test_triple", "kernel", "layers.0", 1, 0),
        ("test_triple", "kernel", "layers.1", 1, 0),
    ]
    assert all(f.ratio <= 1 for f in found)


@pytest.mark.parametrize("mode", ["eager", "float64"])
def test_a_wrong_one_is_named_and_saved(mode, monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(WRONG, "scale", 1.001)
    run(Model(), torch.ones(3, 5), shadow=mode, shadow_dir=str(tmp_path))
    first = shadow.statistics()[0]
    assert first.breaches == 1 and first.largest == pytest.approx(0.003, rel=1e-3) and first.ratio > 1
    assert "gcu::test_triple (kernel) differs from its meaning by 3.00e-03" in caplog.text
    assert "layers.0 test_triple; inputs float32[3, 5]" in caplog.text
    saved = sorted(file.name for file in tmp_path.iterdir())
    assert saved == ["test_triple-0.pt", "test_triple-0.py", "test_triple-1.pt", "test_triple-1.py"]
    again = shadow.replay(tmp_path / "test_triple-0.pt")
    assert again.breaches == 1 and again.largest == pytest.approx(first.largest, rel=1e-3)
    monkeypatch.setitem(WRONG, "scale", 1.0)
    assert shadow.replay(tmp_path / "test_triple-1.pt").breaches == 0


def test_the_rule_that_built_the_call_is_named(monkeypatch):
    def build(graph, node, match):
        new = graph.call_function(TRIPLE.default, (node.args[0],))
        new.meta["val"] = node.meta["val"]
        return new

    anchor = torch.ops.aten.mul.Tensor
    rule = Rule("triple", "canonicalise", (anchor,), lambda node: node, build, lambda x: x * 3)
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), rule))
    run(lambda x: x * 3, torch.ones(2), shadow="eager")
    assert [(f.rule, f.calls) for f in shadow.statistics()] == [("triple", 1)]


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_written_arguments_are_compared_and_written_once(scale, monkeypatch):
    monkeypatch.setitem(WRONG, "scale", scale)
    cache = torch.ones(4)
    run(lambda cache, x: STORE(cache, x=x), cache, torch.full((4,), 2.0), shadow="eager")
    assert torch.equal(cache, torch.full((4,), 1 + 2 * scale))
    (found,) = shadow.statistics()
    assert (found.calls, found.breaches) == (1, int(scale != 1))
    assert found.largest == pytest.approx(2 * (scale - 1))


def test_whole_numbers_must_be_equal(monkeypatch):
    run(COUNT, torch.randn(5, 3), shadow="float64")
    monkeypatch.setitem(WRONG, "scale", 2.0)
    run(COUNT, torch.randn(5, 3), shadow="float64")
    assert [found.breaches for found in shadow.statistics()] == [1]


def test_a_meaning_without_float64_is_said_and_compared_in_its_own_dtype():
    run(lambda x: ROWS(x, 4), torch.randn(3, 4), shadow="float64")
    (found,) = shadow.statistics()
    assert found.calls == 1 and found.breaches == 0
    assert found.unchecked == {"in float64: GcuCompileError: no float64 here": 1}


def test_not_a_number_on_one_side_only_is_a_breach():
    good, bad = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])
    assert shadow.compare([good], [good.clone()], 1, 1) == (0.0, 0.0)
    assert shadow.compare([good], [bad], 1, 1)[1] == float("inf")
    assert shadow.compare([torch.tensor([float("inf")])], [torch.tensor([float("-inf")])], 1, 1)[1] == float("inf")
    codes, next_codes = torch.tensor([3, 4], dtype=torch.int8), torch.tensor([3, 5], dtype=torch.int8)
    assert shadow.compare([codes], [next_codes], 1, 1)[1] == float("inf")
    assert shadow.compare([codes], [next_codes], 1, 1, steps=1)[1] == 1
    assert shadow.compare([codes], [next_codes + 1], 1, 1, steps=1)[1] > 1


def test_the_sampler_agrees_with_its_meaning():
    import gcu_compile.kernels.sampling  # noqa: F401

    seeds = torch.arange(4)
    run(lambda x: torch.ops.gcu.sample(x, seeds, seeds), torch.randn(4, 100), shadow="float64")
    (found,) = shadow.statistics()
    assert (found.op, found.calls, found.breaches, dict(found.unchecked)) == ("sample", 1, 0, {})


def test_summary_is_printed_at_exit_and_off_runs_nothing():
    code = (
        "import sys, torch, gcu_compile.backend\n"
        "from gcu_compile.kernels import registry\n"
        "s = torch.arange(2)\n"
        "fn = torch.compile(lambda x: torch.ops.gcu.sample(x, s, s), backend='gcu', options={'inductor': False})\n"
        "fn(torch.randn(2, 9)); print(registry.watcher is None, 'gcu_compile.debug.shadow' in sys.modules)\n"
    )
    for mode, expected in (("0", "True False"), ("1", "False True")):
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "GCU_COMPILE_SHADOW": mode})
        assert done.stdout.strip() == expected, done.stderr
        assert ("Shadow check" in done.stderr and "gcu::sample" in done.stderr) == (mode == "1")
