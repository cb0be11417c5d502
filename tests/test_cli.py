"""The `gcu-compile` command: reports for people and for programs, errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [str(Path(sys.executable).with_name("gcu-compile"))]


def run(*words, **environ):
    import os

    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, env={**os.environ, **environ})


def test_info_prints_target_versions_and_options(tmp_path):
    result = run("info", "--json", str(tmp_path / "info.json"), GCU_COMPILE_DUMP="elsewhere")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "info.json").read_text())
    assert report["target"] == "host" and report["targets"]["host"] == "here"
    assert report["versions"]["torch"].startswith("2.")
    assert report["options"]["dump"] | {"help": ""} == {"value": "elsewhere", "from": "environment", "help": ""}
    for word in ("target", "torch", "cache", "post_processing_dtype", "elsewhere"):
        assert word in result.stdout


def test_info_names_the_emulated_card(tmp_path):
    result = run("info", "--json", str(tmp_path / "info.json"), GCU_COMPILE_EMULATE="gcu400")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "info.json").read_text())
    assert report["target"] == "gcu400"
    assert report["targets"]["gcu400"] == "emulated (GCU_COMPILE_EMULATE)"
    assert report["targets"]["gcu300"] == "the card here is gcu400"


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        (["info"], {"GCU_COMPILE_TARGT": "host"}, "Did you mean 'GCU_COMPILE_TARGET'?"),
        (["info"], {"GCU_COMPILE_TARGET": "gcu500"}, "expected one of 'auto', 'host', 'cuda', 'gcu300', 'gcu400'"),
    ],
)
def test_a_wrong_setting_is_one_line(words, environ, message):
    result = run(*words, **environ)
    assert result.returncode == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_demo_model_refuses_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("demo-model", "--dir", str(tmp_path))
    assert result.returncode == 2 and "exists but lacks" in result.stderr
