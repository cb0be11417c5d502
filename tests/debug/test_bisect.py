"""A wrong rule planted among right ones is found, named by match, in O(log) compilations; the script reproduces it."""

import math
import subprocess
import sys

import pytest
import torch

from gcu_compile.debug.bisect import bisect, script
from gcu_compile.lowering import pipeline
from gcu_compile.lowering.rule import Rule
from gcu_compile.lowering.rules import all_rules

aten, prims = torch.ops.aten, torch.ops.prims
LAYERS = 9


def stack(x):
    """Nine layers: each scales, squashes, and adds; every layer's result is an output, so that no error dies out."""
    layers = []
    for layer in range(LAYERS):
        x = torch.tanh(x * (1.25 + layer / 8)) + x.exp().neg().sigmoid()
        layers.append(x)
    return layers


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


@pytest.mark.parametrize("at", [0, 4, 8])
@pytest.mark.parametrize(
    ("name", "anchor", "build"),
    [
        ("wrong_scale", aten.mul.Tensor, wrong_scale),
        ("wrong_residual", aten.add.Tensor, wrong_residual),
        ("stale_cast", aten.tanh.default, stale_cast),
    ],
)
def test_planted_rule_is_named(name, anchor, build, at, monkeypatch):
    rule = planted(name, anchor, at, build)
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), rule))
    found = bisect(stack, torch.randn(4, 8), options={"inductor": False})
    assert (found.kind, found.rule, found.index) == ("match", name, at), str(found)
    assert found.error > 0 and found.source.startswith("test_bisect.py:")
    assert found.runs <= math.ceil(math.log2(LAYERS)) + 4
    assert found.remedy == {"disable_matches": [f"{name}@{at}"]}


def test_right_code_is_cleared():
    found = bisect(stack, torch.randn(4, 8))
    assert (found.kind, found.runs) == ("nothing", 1)


def test_arguments_that_are_written_to_are_copied():
    x = torch.zeros(3)

    def fn(y):
        return y.add_(1) * 2

    assert bisect(fn, x).kind == "nothing" and torch.equal(x, torch.zeros(3))


def test_two_wrong_matches_are_not_blamed_on_one(monkeypatch):
    rules = [planted("first", aten.mul.Tensor, 2, wrong_scale), planted("second", aten.tanh.default, 6, stale_cast)]
    monkeypatch.setattr(pipeline, "all_rules", lambda: (*all_rules(), *rules))
    assert bisect(stack, torch.randn(4, 8), options={"inductor": False}).kind == "several"


CASE = '''
import torch

from gcu_compile.lowering import pipeline
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
