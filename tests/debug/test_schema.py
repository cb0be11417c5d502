"""Every report is what docs/json.md says."""

import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import gcu_compile
from gcu_compile.debug import dump, page, schema, shadow
from gcu_compile.debug.bisect import bisect

PLAIN = {"inductor": False}


def fn(x):
    return torch.ops.gcu.sample(x.view(x.shape).bfloat16().float(), *[torch.zeros(2, dtype=torch.int64)] * 2)


def test_explain():
    schema.Explain.model_validate(gcu_compile.explain(fn, torch.randn(2, 5)).to_json())


def test_bisect():
    schema.Bisect.model_validate(bisect(fn, torch.randn(2, 5), options=PLAIN).to_json())


def test_dump(tmp_path):
    dump.dump(fn, torch.randn(2, 5), directory=tmp_path, options={"cache": False})
    schema.Dump.model_validate(page.data(tmp_path))


def test_shadow():
    shadow.reset()
    torch.compiler.reset()
    torch.compile(fn, backend="gcu", options={**PLAIN, "shadow": "1"})(torch.randn(2, 5))
    shadow.disable()
    (found,) = shadow.statistics()
    schema.Statistic.model_validate(found.to_json())


def test_a_field_that_is_not_in_it_is_refused():
    report = gcu_compile.explain(lambda x: x + 1, torch.ones(2), options=PLAIN).to_json()
    with pytest.raises(ValidationError):
        schema.Explain.model_validate({**report, "new": 1})


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of Python spell some types differently")
def test_document_is_up_to_date():
    assert (Path(__file__).parents[2] / "docs" / "json.md").read_text() == schema.markdown()
