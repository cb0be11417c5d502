"""`gcu-compile cache`: tables for people, JSON for programs."""

import json

import pytest
from typer.testing import CliRunner

from gcu_compile.cache.store import Entry, Store
from gcu_compile.cli.main import app
from gcu_compile.debug import schema


@pytest.fixture
def cache(tmp_path):
    """cache(*words) -> (result, its JSON), over two entries that differ in one rule and one damaged file."""
    store = Store(tmp_path / "cache")
    for key, created, rules in (("aaaa", 1.0, []), ("bbbb", 2.0, ["noop_view"])):
        graph = {"name": "model.py:3 forward", "hash": "h"}
        ingredients = {"target": "host", "graph": graph, "options": {"disable_rules": rules}}
        store.save(Entry(key, ingredients, created=created, seconds={"total": 1.5}))
    store.path("cccc").write_bytes(b"half")

    def run(*words):
        file = tmp_path / "report.json"
        words = ["cache", *words, "--dir", str(tmp_path / "cache"), "--json", str(file)]
        result = CliRunner().invoke(app, words)
        report = json.loads(file.read_text())
        model = {n: getattr(schema, f"Cache{n.title()}") for n in ("list", "diff", "explain", "clear")}[words[1]]
        model.model_validate(report)
        return result, report

    return run


def test_list(cache):
    result, report = cache("list")
    assert result.exit_code == 0 and "bbbb" in result.stdout and "damaged" in result.stdout
    assert [entry["key"] for entry in report["entries"]] == ["bbbb", "aaaa"]
    assert report["entries"][0]["seconds"] == 1.5 and list(report["damaged"]) == ["cccc.entry"]


def test_diff(cache):
    result, report = cache("diff", "aa", "bb")
    assert result.exit_code == 1 and "options.disable_rules" in result.stdout
    assert report["changed"] == {"options.disable_rules": [[], ["noop_view"]]}
    result, report = cache("diff", "aa", "aa")
    assert result.exit_code == 0 and report["changed"] == {}


def test_explain_takes_the_newest(cache):
    result, report = cache("explain")
    assert "bbbb: differs from aaaa in options.disable_rules" in result.stdout
    assert (report["entry"], report["nearest"]) == ("bbbb", "aaaa")
    result, report = cache("explain", "aaaa")
    assert "the first compilation" in result.stdout and report["nearest"] == ""


def test_a_bypass_is_told(cache, tmp_path):
    store, reason = Store(tmp_path / "cache"), "AOTAutograd's cache was bypassed: a reason"
    entry = Entry("dddd", {"target": "host", "graph": {"name": "g", "hash": "h"}}, bypass=reason)
    store.save(entry)
    result, report = cache("list")
    assert f"dddd: a miss every time: {reason}" in result.stdout.replace("\n", " ")
    assert [one["bypass"] for one in report["entries"]] == [reason, "", ""]
    result, report = cache("explain", "dd")
    assert f"a miss every time: {reason}" in result.stdout and report["bypass"] == reason


def test_clear(cache):
    result, report = cache("clear")
    assert report["removed"] == 3 and "3 entries removed" in result.stdout
    result, report = cache("explain")
    assert "no entries" in result.stdout and report["entry"] == ""
