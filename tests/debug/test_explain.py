"""`gcu_compile.explain` and its command: what was fused, what was not and why, breaks, fallbacks."""

import io
import json

import pytest
import torch

import gcu_compile
from gcu_compile.cli.explain import load, parse
from gcu_compile.errors import CheckpointError, InvalidValueError, UnknownNameError
from gcu_compile.kernels.sampling import eager

# Inductor's own passes remove such no-ops before ours see the graph.
PLAIN = {"inductor": False}


def test_fused_and_near_miss_are_told_with_reasons():
    def fn(x, y):
        return x.float().bfloat16() * 2, y.bfloat16().float() + 1

    report = gcu_compile.explain(fn, torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(3, 4), options=PLAIN)
    assert report.fused == {"dtype_round_trip": 1}
    (near,) = [match for match in report.matches if match.status == "near_miss"]
    assert "does not hold every value" in near.reason and near.source.startswith("test_explain.py:")
    assert report.error == 0
    assert report.options["inductor"] is False and report.cache[0]["state"] == "off"


def test_says_the_same_on_a_second_run():
    x = torch.randn(2, 2)
    reports = [gcu_compile.explain(lambda x: x.view(x.shape).sin(), x, options=PLAIN) for _ in range(2)]
    assert reports[0].fused == reports[1].fused == {"noop_view": 1}


def test_graph_breaks_and_several_graphs():
    def broken(x):
        x = x.sin() + 1
        torch._dynamo.graph_break()
        return x.cos()

    report = gcu_compile.explain(broken, torch.randn(3))
    assert len(report.graphs) == 2 and sum(report.graph_breaks.values()) == 1


def test_calls_and_fallbacks_of_fused_operations():
    def fn(x):
        return torch.ops.gcu.sample(x, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))

    x = torch.randn(2, 9)
    assert gcu_compile.explain(fn, x).calls == {"sample: host_cpp": 1}
    report = gcu_compile.explain(fn, x.double())
    ((reason, count),) = report.fallbacks.items()
    assert count == 1 and "torch.float64" in reason
    assert torch.equal(fn(x), eager.sample(x, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)))


def test_training_graphs_say_so():
    layer = torch.nn.Linear(3, 3)
    report = gcu_compile.explain(layer, torch.randn(2, 3))
    assert [graph.inference for graph in report.graphs] == [False] and not report.matches


def test_json_and_table():
    from rich.console import Console

    report = gcu_compile.explain(lambda x: x.view(x.shape).sin(), torch.randn(2, 2), options=PLAIN)
    data = json.loads(json.dumps(report.to_json()))
    assert data["fused"] == {"noop_view": 1} and data["graphs"][0]["target"] == "host"
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "noop_view" in text and "fused" in text


def test_command_reads_a_function_from_a_file(tmp_path):
    file = tmp_path / "case.py"
    file.write_text("import torch\n\ndef case():\n    return torch.sin, (torch.ones(2),)\n")
    fn, args = load(f"{file}:case", 4)
    assert fn is torch.sin and torch.equal(args[0], torch.ones(2))
    with pytest.raises(CheckpointError, match="no function 'other'"):
        load(f"{file}:other", 4)
    with pytest.raises(CheckpointError, match="has no config.json"):
        load(str(tmp_path), 4)


def test_settings_are_checked():
    assert parse(["cache=0", "disable_rules=a,b"]) == {"cache": "0", "disable_rules": "a,b"}
    with pytest.raises(InvalidValueError, match="option=value"):
        parse(["cache"])
    with pytest.raises(UnknownNameError, match="Did you mean 'cache'"):
        from gcu_compile.options import resolve

        resolve(parse(["cahce=1"]), {})


class Layer(torch.nn.Module):
    def forward(self, x, y):
        return (x.float().bfloat16() * 2).sin(), y.bfloat16().float() + 1


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer(), Layer()])

    def forward(self, x, y):
        for layer in self.layers:
            x, y = layer(x, y)
        return x, y


def test_every_rule_in_every_layer():
    report = gcu_compile.explain(Layers(), torch.ones(3).bfloat16(), torch.ones(3), options=PLAIN)
    assert report.layers == {"dtype_round_trip": {f"layers.{n}": {"fused": 1, "near_miss": 1} for n in range(3)}}


def test_a_hit_explains_the_same_and_kernels_name_their_maker(tmp_path):
    def fn(x):
        x = torch.ops.aten.slice(x @ x, 0, 0, 2**62)
        return torch.ops.gcu.sample(x.sin(), *[torch.zeros(3, dtype=torch.int64)] * 2)

    options = {"cache_dir": str(tmp_path)}
    miss, hit = (gcu_compile.explain(fn, torch.randn(3, 3), options=options).to_json() for _ in range(2))
    states = [report.pop("cache")[0]["state"] for report in (miss, hit)]
    assert states == ["miss", "hit"] and miss == hit
    assert {kernel["by"] for kernel in miss["kernels"]} == {"library", "inductor", "hand-written"}
    assert any(kernel["name"] == "gcu::sample" for kernel in miss["kernels"])


def test_seconds_of_a_hit_count_once(tmp_path):
    from gcu_compile import backend
    from gcu_compile.debug.explain import Watch

    watch, options = Watch(), {"cache_dir": str(tmp_path)}
    for _ in range(2):
        torch.compiler.reset()
        torch.compile(lambda x: x.sin() + 1, backend="gcu", options=options)(torch.ones(3))
    report = watch.explanation(options)
    assert [one["state"] for one in report.cache] == ["miss", "hit"]
    assert report.seconds == backend.recordings[-2].seconds and report.seconds["total"] > 0


def test_a_way_that_is_not_here_is_named(tmp_path, monkeypatch):
    import sys

    from gcu_compile.cli import explain as command
    from gcu_compile.errors import TargetUnavailableError

    with pytest.raises(UnknownNameError, match="Did you mean 'vllm'"):
        command.explain("anything", through="vlm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(TargetUnavailableError, match="needs vLLM"):
        command.engine("explain")
