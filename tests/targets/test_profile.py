"""Profiles: every fact has a source, and a user's file overrides one fact at a time or is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gcu_compile.errors import InvalidValueError, UnknownNameError
from gcu_compile.targets.profile import FACTS, PROFILES, load_profile

COMMAND = [str(Path(sys.executable).with_name("gcu-compile")), "target"]


def override(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("target", PROFILES)
def test_every_fact_has_unit_source_and_confidence(target):
    facts = load_profile(target).facts()
    assert set(facts) == set(FACTS)
    for name, fact in facts.items():
        assert fact["unit"] and len(fact["source"]) > 10, name
        assert fact["confidence"] in ("measured", "documented", "assumed"), name
        # What nobody published is unknown, never presented as documented.
        assert fact["value"] is not None or fact["confidence"] == "assumed", name


def test_the_published_figures():
    s60, l600 = load_profile("gcu300"), load_profile("gcu400")
    assert s60.value("l1_usable_bytes") == 1536 * 1024 - 512
    assert s60.value("shared_bytes_per_warp") == 8 << 20 and s60.value("max_warps") == 8
    assert s60.value("grid_max") == [65535, 255, 255] and s60.value("refuses_64_bit") is True
    assert l600.value("shared_bytes_per_block") == 7 << 20 and l600.value("max_warps") == 4
    assert l600.value("dot_precisions") == ["tf32", "tf32x3", "ieee"]
    assert "f8E5M2" in l600.value("dtypes") and "f8E5M2" not in s60.value("dtypes")


def test_a_bare_value_overrides_one_fact(tmp_path):
    file = override(tmp_path, "launch_cost: 17.4\n")
    profile = load_profile("gcu300", file)
    assert profile.value("launch_cost") == 17.4
    assert profile.launch_cost.source == f"override in {file}" and profile.launch_cost.confidence == "assumed"
    assert profile.launch_cost.unit == load_profile("gcu300").launch_cost.unit
    assert profile.value("sip_count") == 24


def test_an_override_may_bring_its_provenance(tmp_path):
    text = "dot_rate: {value: {bf16: 100}, source: our card, confidence: measured}\n"
    fact = load_profile("gcu300", override(tmp_path, text)).dot_rate
    assert (fact.value, fact.source, fact.confidence) == ({"bf16": 100}, "our card", "measured")


def test_an_empty_override_changes_nothing(tmp_path):
    assert load_profile("gcu300", override(tmp_path, "")) == load_profile("gcu300")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("lauch_cost: 3\n", UnknownNameError, "Did you mean 'launch_cost'"),
        ("launch_cost: {value: 3, sauce: x}\n", UnknownNameError, "Did you mean 'source'"),
        ("launch_cost: soon\n", InvalidValueError, "fact launch_cost"),
        ("sip_count: 24.5\n", InvalidValueError, "fact sip_count"),
        ("sip_count: true\n", InvalidValueError, "fact sip_count"),
        ("refuses_64_bit: 1\n", InvalidValueError, "fact refuses_64_bit"),
        ("dtypes: {a: b}\n", InvalidValueError, "fact dtypes"),
        ("launch_cost: {value: 3, unit: seconds}\n", InvalidValueError, "unit of fact launch_cost"),
        ("launch_cost: {value: 3, confidence: sure}\n", InvalidValueError, "fact launch_cost.confidence"),
        ("- launch_cost\n", InvalidValueError, "a mapping from fact names"),
        ("a: [\n", InvalidValueError, "a readable YAML file"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        load_profile("gcu300", override(tmp_path, text))


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="gcu300, gcu400"):
        load_profile("gcu500")
    with pytest.raises(UnknownNameError, match="Did you mean 'sip_count'"):
        load_profile("gcu300").value("sip_cont")
    with pytest.raises(InvalidValueError, match="readable YAML"):
        load_profile("gcu300", "no-such-file.yaml")


def test_the_command_prints_facts_and_sources(tmp_path):
    file = override(tmp_path, "launch_cost: 17.4\n")
    words = ["gcu300", "--profile", file, "--json", str(tmp_path / "facts.json")]
    result = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "facts.json").read_text())
    assert report["target"] == "gcu300" and set(report["facts"]) == set(FACTS)
    assert report["facts"]["launch_cost"]["value"] == 17.4
    assert "launch_cost" in result.stdout and f"{len(FACTS)} facts" in result.stdout


def test_the_command_refuses_an_unknown_target():
    result = subprocess.run([*COMMAND, "gcu30"], capture_output=True, text=True)
    assert result.returncode == 2 and "Did you mean 'gcu300'" in result.stderr
