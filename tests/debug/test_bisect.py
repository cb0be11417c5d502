"""A wrong rule planted among right ones is found, named by match, in O(log) compilations; the script reproduces it."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gcu_compile.cli.main import app
from gcu_compile.debug.bisect import bisect, script, search
from gcu_compile.lowering import pipeline
from gcu_compile.lowering.context import MatchRecord
from gcu_compile.lowering.rule import Rule
from gcu_compile.lowering.rules import all_rules

aten, prims = torch.ops.aten, torch.ops.prims
LAYERS, FOLDER = 6, Path(__file__).parent


class Layer(torch.nn.Module):
    """Causal attention and a squashed residual, on columns of its own, so that layers share no operation."""

    def __init__(self, number):
        super().__init__()
        self.first = number

    def forward(self, x):
        x = x[:, self.first : self.first + 8]
        places = torch.arange(self.first, self.first + x.shape[0])
        scores = (x @ x.t()) * 0.125
        visible = torch.le(places[None, :], places[:, None])
        mixed = torch.softmax(scores.masked_fill(~visible, -1e9), -1) @ x
        return torch.tanh(mixed) + x.sigmoid()


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(number) for number in range(LAYERS)])

    def forward(self, x):
        return [layer(x) for layer in self.layers]


stack = Stack()


def planted(name, anchor, at, build):
    """A rule that is right everywhere but at its match number `at`."""

    def match(node):
        # Places of the operation in this graph, in order; those rewritten before keep theirs.
        places = [other for other in node.graph.nodes if other.target is anchor]
        return places.index(node)

    def rewrite(graph, node, index):
        new = build(graph, node) if index == at else graph.call_function(node.target, node.args, node.kwargs)
        new.meta.update(node.meta)
        return new

    return Rule(name, "canonicalise", (anchor,), match, rewrite, lambda x: x)


def wrong_scale(graph, node):
    return graph.call_function(node.target, (node.args[0], node.args[1] * 1.5))


def wrong_mask_edge(graph, node):
    """A token no longer sees itself."""
    edge = graph.call_function(aten.sub.Tensor, (node.args[1], 1))
    edge.meta["val"] = node.args[1].meta["val"]
    return graph.call_function(node.target, (node.args[0], edge))


def wrong_residual(graph, node):
    return graph.call_function(node.target, (node.args[0], node.args[0]))


def stale_cast(graph, node):
    """tanh of a value rounded to a narrow dtype."""
    value = node.args[0].meta["val"]
    narrow = graph.call_function(prims.convert_element_type.default, (node.args[0], torch.bfloat16))
    narrow.meta["val"] = value.to(torch.bfloat16)
    wide = graph.call_function(prims.convert_element_type.default, (narrow, value.dtype))
    wide.meta["val"] = value
    return graph.call_function(node.target, (wide,))


KINDS = {
    "wrong_scale": (aten.mul.Tensor, wrong_scale),
    "wrong_mask_edge": (aten.le.Tensor, wrong_mask_edge),
    "wrong_residual": (aten.add.Tensor, wrong_residual),
    "stale_cast": (aten.tanh.default, stale_cast),
}


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("name", KINDS)
def test_planted_rule_is_named(name, at, monkeypatch, tmp_path):
    anchor, build = KINDS[name]
    rule = planted(name, anchor, at, build)
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), rule))
    found = bisect(stack, torch.randn(4, 8 + LAYERS), options={"inductor": False})
    assert (found.kind, found.rule, found.index) == ("match", name, at), str(found)
    assert (found.step, found.layer) == ("canonicalise", f"layers.{at}")
    assert found.error > 0 and found.source.startswith("test_bisect.py:")
    # The rules that fire here are the planted one and, at most, two canonical forms.
    assert found.runs <= math.ceil(math.log2(LAYERS)) + math.ceil(math.log2(3)) + 4
    assert found.remedy == {"disable_matches": [f"{name}@{at}"]}
    if at:  # the script fails, and passes without the match
        file = tmp_path / "reproduction.py"
        file.write_text(script(found, PLANTED.format(folder=str(FOLDER), name=name, at=at), "case"))
        for words, status in (([], 1), (["--without"], 0)):
            monkeypatch.setattr(sys, "argv", [str(file), *words])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(file), run_name="__main__")
            assert ended.value.code == status


PLANTED = """
import sys

sys.path.insert(0, {folder!r})


def case():
    import test_bisect as plant

    anchor, build = plant.KINDS[{name!r}]
    rule = plant.planted({name!r}, anchor, {at}, build)
    plant.pipeline.all_rules = lambda: (*plant.all_rules(), rule)
    return plant.stack, (plant.torch.randn(4, 8 + plant.LAYERS),)
"""


def test_a_canonical_form_is_not_blamed_for_what_it_made_possible(monkeypatch):
    """The wrong rule fires only where the no-op view is gone: without either the result is right."""

    def build(graph, node, match):
        new = graph.call_function(aten.cos.default, node.args)
        new.meta.update(node.meta)
        return new

    def match(node):
        return node if node.args[0].op == "placeholder" else None

    late = Rule("late", "attention", (aten.sin.default,), match, build, torch.cos)
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), late))
    found = bisect(lambda x: x.view(x.shape).sin(), torch.ones(2, 3), options={"inductor": False})
    assert (found.kind, found.step, found.rule) == ("match", "attention", "late")


def test_given_options_stay_and_are_in_the_script(monkeypatch):
    rule = planted("wrong_scale", aten.mul.Tensor, 1, wrong_scale)
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), rule))
    options = {"inductor": False, "disable_matches": "noop_view@7"}
    found = bisect(stack, torch.randn(4, 8 + LAYERS), options=options)
    assert found.remedy == {"disable_matches": ["noop_view@7", "wrong_scale@1"]}
    text = script(found, "CASE", "case")
    assert "'disable_matches': ['noop_view@7', 'wrong_scale@1']" in text and str(options) in text


def test_command_writes_a_script_for_a_model_folder(tmp_path, monkeypatch):
    import gcu_compile.cli.explain as loader
    from gcu_compile.cli import bisect as command

    rule = planted("wrong_scale", aten.mul.Tensor, 1, wrong_scale)
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), rule))
    for module in (loader, command):
        monkeypatch.setattr(module, "load", lambda subject, length: (stack, (torch.randn(4, 8 + LAYERS),)))
    file = tmp_path / "again.py"
    words = ["bisect", str(tmp_path), "--set", "inductor=0", "--script", str(file), "--json", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "rule wrong_scale, match 1" in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["layer"] == "layers.1" and report["remedy"] == {"disable_matches": ["wrong_scale@1"]}
    monkeypatch.setattr(sys, "argv", [str(file), "--without"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 0


def test_right_code_is_cleared():
    found = bisect(lambda x: (x * 2).sin(), torch.randn(4))
    assert (found.kind, found.runs) == ("nothing", 1)


def test_arguments_that_are_written_to_are_copied():
    x = torch.zeros(3)

    def fn(y):
        return y.add_(1) * 2

    assert bisect(fn, x).kind == "nothing" and torch.equal(x, torch.zeros(3))


def test_one_of_several_graphs_is_named(monkeypatch):
    """The same place of the same rule is right in the first graph and wrong in the second."""

    def build(graph, node, match):
        wrong = any(other.target is aten.cos.default for other in graph.nodes)
        new = graph.call_function(aten.tan.default if wrong else node.target, node.args)
        new.meta.update(node.meta)
        return new

    rule = Rule("late", "attention", (aten.sin.default,), lambda node: node, build, torch.sin)
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), rule))

    def fn(x):
        x = x.sin() * 2
        torch._dynamo.graph_break()
        return x.sin() + x.cos()

    found = bisect(fn, torch.ones(2, 3), options={"inductor": False})
    assert (found.kind, found.rule, found.graph, found.index) == ("match", "late", 1, 0)
    assert found.remedy == {"disable_matches": ["late@1.0"]} and "match 0 of graph 1" in str(found)
    assert bisect(fn, torch.ones(2, 3), options={"inductor": False, **found.remedy}).kind == "nothing"


GRAPHS, PLACES = 9, 4


@pytest.mark.parametrize("wrong", [("square", 0, 0), ("attention", 8, 3), ("square", 5, 2), None])
def test_search_without_inductor_over_many_graphs(wrong):
    """As through vLLM: a run is told its options, and says what came out and what fired."""
    steps = {"square": "canonicalise", "attention": "attention"}

    def run(options):
        off = set(options.get("disable_matches", ()))
        fired = [
            MatchRecord(rule, index, f"layers.{graph}", "node", "fused", graph=graph)
            for graph in range(GRAPHS)
            for rule in ("square", "attention")
            for index in range(PLACES)
            if steps[rule] not in options.get("disable_steps", ()) and rule not in options.get("disable_rules", ())
        ]
        fired = [match for match in fired if match.name not in off]
        return [torch.tensor([float(any((m.rule, m.graph, m.index) == wrong for m in fired))])], fired

    found = search(run, [torch.zeros(1)], inductor=False)
    if wrong is None:
        assert (found.kind, found.runs) == ("nothing", 1)
        return
    rule, graph, index = wrong
    assert (found.kind, found.rule, found.graph, found.index) == ("match", rule, graph, index)
    assert found.layer == f"layers.{graph}" and found.remedy == {"disable_matches": [f"{rule}@{graph}.{index}"]}
    assert found.runs <= 1 + 1 + 1 + math.ceil(math.log2(GRAPHS * PLACES)) + 1


def test_search_that_finds_no_rule_guilty():
    found = search(lambda options: ([torch.ones(1)], []), [torch.zeros(1)], inductor=False)
    assert (found.kind, found.runs) == ("elsewhere", 2)


def test_two_wrong_matches_are_not_blamed_on_one(monkeypatch):
    rules = [planted("first", aten.mul.Tensor, 2, wrong_scale), planted("second", aten.tanh.default, 4, stale_cast)]
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), *rules))
    assert bisect(stack, torch.randn(4, 8 + LAYERS), options={"inductor": False}).kind == "several"


CASE = '''
import torch

from gcu_compile.lowering import pipeline
from gcu_compile.lowering.context import MatchRecord
from gcu_compile.lowering.rule import Rule
from gcu_compile.lowering.rules import all_rules


def case():
    wrong = Rule(
        "wrong",
        "canonicalise",
        (torch.ops.aten.sin.default,),
        lambda node: node,
        lambda graph, node, _: graph.call_function(torch.ops.aten.cos.default, node.args, {}),
        torch.cos,
    )

    def build(graph, node, match):
        new = graph.call_function(torch.ops.aten.cos.default, node.args, {})
        new.meta.update(node.meta)
        return new

    object.__setattr__(wrong, "build", build)
    pipeline.all_rules = lambda: (*all_rules(), wrong)
    return (lambda x: x.sin() + 1), (torch.ones(3),)
'''


def test_script_fails_alone_and_passes_without_the_culprit(tmp_path, monkeypatch):
    space: dict = {}
    monkeypatch.setattr(pipeline, "all_rules", pipeline.all_rules)  # put back afterwards
    exec(CASE, space)
    fn, args = space["case"]()
    found = bisect(fn, *args)
    assert (found.kind, found.rule) == ("match", "wrong")
    file = tmp_path / "reproduction.py"
    file.write_text(script(found, CASE, "case"))
    plain = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert plain.returncode == 1 and "rule wrong, match 0" in plain.stdout, plain.stderr
    fixed = subprocess.run([sys.executable, str(file), "--without"], capture_output=True, text=True)
    assert fixed.returncode == 0 and "agree" in fixed.stdout, fixed.stderr
