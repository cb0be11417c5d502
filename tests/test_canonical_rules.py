"""Canonical forms: each rule fires where it should, refuses a near miss with a reason, and changes no value."""

import json

import pytest
import torch

from gcu_compile import backend, recording
from gcu_compile.lowering.rules import all_rules


def run(fn, *args, options=None, dynamic=None):
    """The report of lowering `fn`, after its results were held bit for bit against plain torch."""
    torch._dynamo.reset()
    backend.reports.clear()
    options = {"inductor": False, **(options or {})}
    compiled = torch.compile(fn, backend="gcu", options=options, dynamic=dynamic, fullgraph=True)
    actual, expected = compiled(*args), fn(*args)
    assert torch.equal(actual, expected) and actual.dtype == expected.dtype
    (report,) = backend.reports
    return report


def ops(report, when="after"):
    return getattr(report.steps[-1] if when == "after" else report.steps[0], f"ops_{when}")


CASES = {
    "noop_view": (
        lambda x: x.view(x.shape).sin(),
        lambda x: x.view(-1).sin(),
        "aten.view.default",
    ),
    "noop_permute": (
        lambda x: x.permute(0, -1).sin(),
        lambda x: x.permute(1, 0).sin(),
        "aten.permute.default",
    ),
    "noop_slice": (
        lambda x: torch.ops.aten.slice(x, 1, 0, 2**62).sin(),
        lambda x: x[:, 1:].sin(),
        "aten.slice.Tensor",
    ),
}


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (0, 4), (7, 129)])
def test_fires_on_a_noop_only(rule, dtype, shape):
    noop, real, op = CASES[rule]
    x = torch.randn(shape, dtype=dtype)
    assert op not in ops(run(noop, x))
    report = run(real, x)
    assert not report.fused[rule]
    assert op in ops(report)


def test_dtype_round_trip():
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    widened = run(lambda x: x.float().bfloat16() * 2, x)
    assert widened.fused == {"dtype_round_trip": 1}
    assert "prims.convert_element_type.default" not in ops(widened)


def test_dtype_round_trip_keeps_a_rounding():
    x = torch.randn(3, 5)
    report = run(lambda x: x.bfloat16().float() * 2, x)
    assert not report.fused
    (match,) = [m for m in report.matches if m.rule == "dtype_round_trip"]
    assert match.status == "near_miss" and "does not hold every value of torch.float32" in match.reason


def test_symbolic_sizes_add_no_recompile():
    torch._dynamo.reset()
    backend.reports.clear()
    fn = torch.compile(
        lambda x: x.view(x.shape[0], 4).sin(), backend="gcu", dynamic=True, options={"inductor": False}
    )
    for rows in (3, 5, 17):
        x = torch.randn(rows, 4)
        assert torch.equal(fn(x), x.sin())
    (report,) = backend.reports
    assert report.fused["noop_view"] == 1


def test_one_rule_or_one_match_can_be_switched_off():
    def fn(x):
        return x.float().bfloat16() * 2 + (x * 3).float().bfloat16()

    x = torch.randn(4, 4, dtype=torch.bfloat16)
    whole = run(fn, x)
    places = whole.fused["dtype_round_trip"]
    assert places >= 1
    assert not run(fn, x, options={"disable_rules": ["dtype_round_trip"]}).fused
    less = run(fn, x, options={"disable_matches": ["dtype_round_trip@0"]})
    assert less.fused["dtype_round_trip"] == places - 1
    assert [m.status for m in less.matches if m.rule == "dtype_round_trip"][0] == "disabled"


def test_a_match_can_be_switched_off_in_one_graph_alone(tmp_path):
    """Two equal graphs, in a cache of their own: the second's code is not that of the first."""

    def fn(x):
        x = x.float().bfloat16() * 2
        torch._dynamo.graph_break()
        return x.float().bfloat16() * 2

    x = torch.randn(4, 4, dtype=torch.bfloat16)
    for names, expected in ((["dtype_round_trip@0"], [0, 0]), (["dtype_round_trip@1.0"], [1, 0]), ([], [1, 1])):
        torch._dynamo.reset()
        recording.restart_numbers()
        before = len(backend.reports)
        options = {"cache_dir": str(tmp_path), "disable_matches": names}
        assert torch.equal(torch.compile(fn, backend="gcu", options=options)(x), fn(x))
        found = backend.reports[before:]
        assert [report.fused["dtype_round_trip"] for report in found] == expected
        assert [match.graph for report in found for match in report.matches] == [0, 1]


def test_step_can_be_switched_off():
    report = run(lambda x: x.view(x.shape).sin(), torch.randn(2, 2), options={"disable_steps": ["canonicalise"]})
    assert "canonicalise" not in [step.name for step in report.steps] and not report.matches


def test_report_survives_json():
    from gcu_compile.lowering.context import GraphReport

    report = run(lambda x: x.view(x.shape).sin(), torch.randn(2, 2))
    assert GraphReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_rule_names_are_unique_and_steps_exist():
    from gcu_compile.lowering.pipeline import STEPS

    names = [rule.name for rule in all_rules()]
    assert len(names) == len(set(names))
    assert {rule.step for rule in all_rules()} <= set(STEPS)
