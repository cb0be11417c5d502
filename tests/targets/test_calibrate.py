"""Calibration on the host: the file it writes is an override that the cost model uses."""

import pytest
import yaml
from typer.testing import CliRunner

from gcu_compile.cli.main import app
from gcu_compile.errors import InvalidValueError, TargetUnavailableError
from gcu_compile.targets.calibrate import _Clock, calibrate, describe
from gcu_compile.targets.cost_calls import predict_call
from gcu_compile.targets.profile import load_profile

SMALL = ["--megabytes", "16", "--size", "256", "--repeats", "3"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("calibrate") / "here.yaml"
    result = CliRunner().invoke(app, ["calibrate", str(file), "--device", "cpu", *SMALL])
    assert result.exit_code == 0, result.output
    return file, result


def test_the_file_overrides_what_was_measured_and_nothing_else(measured):
    file, result = measured
    facts = yaml.safe_load(file.read_text())
    shipped, mine = load_profile("gcu300"), load_profile("gcu300", str(file))
    changed = {name for name, fact in mine.facts().items() if fact != shipped.facts()[name]}
    assert changed == set(facts) == {"launch_cost", "dram_bandwidth", "dot_rate", "vector_rate"}
    for name in changed:
        fact = mine.facts()[name]
        assert fact["confidence"] == "measured" and describe("cpu") in fact["source"]
        assert fact["unit"] == shipped.facts()[name]["unit"]
    assert all(name in result.output for name in facts)


def test_predictions_follow_the_file(measured):
    product = ("extern_kernels.mm", [((512, 512), 4, "f32")] * 2, [((512, 512), 4, "f32")])
    mine = load_profile("gcu300", str(measured[0]))
    shipped = predict_call(*product, load_profile("gcu300"))
    here = predict_call(*product, mine)
    assert here.microseconds != shipped.microseconds
    assert here.times["launch"] == mine.value("launch_cost")


def test_units(monkeypatch):
    """Every call takes 100 us and a launch 10: the rates follow by hand."""
    monkeypatch.setattr(_Clock, "median", lambda self, call, times: 10.0 if times == 200 else 110.0)
    facts = {name: fact["value"] for name, fact in calibrate("cpu", megabytes=1, size=100, repeats=1).items()}
    assert facts["launch_cost"] == 10.0
    assert facts["dram_bandwidth"] == round(2 * (1 << 20) / 100e-6 / 1e9, 2)
    assert facts["dot_rate"]["f32"] == round(2 * 100**3 / 100e-6 / 1e12, 3)
    assert facts["vector_rate"] == round(100 * 100 / 100e-6 / 1e9, 3)


def test_a_device_that_is_not_here_and_sizes_of_nothing_are_refused():
    with pytest.raises(TargetUnavailableError, match="no device 'meta2'"):
        calibrate("meta2")
    for name in ("megabytes", "size", "repeats"):
        with pytest.raises(InvalidValueError, match=f"{name} cannot be 0"):
            calibrate("cpu", **{name: 0})
