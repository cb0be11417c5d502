"""`docs/adding-a-rule.md`, followed literally, adds a working rule."""

import re
from pathlib import Path

import pytest
import torch
from lowered import check, lowered, statuses

from gcu_compile.lowering import pipeline

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-rule.md"


@pytest.fixture
def guide(monkeypatch):
    """The rule of the guide's first block is listed; its second block, to be run."""
    rule, use = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    module = {"aten": torch.ops.aten}
    exec(rule, module)
    every = (*pipeline.all_rules(), *module["RULES"])
    monkeypatch.setattr(pipeline, "all_rules", lambda: every)
    return use


def test_it_works_as_written(guide):
    exec(guide, {"check": check, "torch": torch})


def test_it_leaves_alone_and_says_why(guide):
    _, report = check(lambda x: -x, torch.randn(3))
    assert not report.fused["negated_twice"]
    _, report = lowered(lambda x: (y := -x, -y), torch.randn(3))
    assert statuses(report, "negated_twice")[-1][0] == "near_miss"
    assert "is used elsewhere" in statuses(report, "negated_twice")[-1][1]
