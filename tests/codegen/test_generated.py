"""Generated kernels: every one obeys the device's rules, and computes what eager does (float64, tolerance table)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gcu_compile.targets.profile import load_profile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from cases import CASES  # noqa: E402

PROFILE = load_profile("gcu300")
# An index for each element; and pairs, whose slices would be of two elements (analysis_private.SHORTEST_RUN).
GATHERS = {"gathered", "unpack_int4"}
VENDOR = {"top_choices": "aten.topk.default", "largest": "aten.argmax.default"}


def worker(mode, folder, **environ):
    """All cases in one process: FakeTensors on the device type can be had once, and not beside an emulated card."""
    out = folder / f"{mode}.json"
    env = {**os.environ, **environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)])}
    command = [sys.executable, str(HERE / "worker.py"), mode, str(out)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    return worker("check", tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return worker("run", tmp_path_factory.mktemp("run"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_eager_does(ran, name):
    assert "error" not in ran[name], ran[name]["error"]


@pytest.mark.parametrize("name", CASES)
def test_it_obeys_the_rules(checked, name):
    assert "error" not in checked[name], checked[name].get("error")
    kernels = checked[name]["kernels"]
    assert kernels or name in VENDOR
    for kernel in kernels:
        assert kernel["legal"], kernel["findings"]
        verdicts = {access["verdict"] for access in kernel["accesses"]}
        expected = {"dma slice", "scalar dma"} | ({"gather"} if name in GATHERS else set())
        assert verdicts <= expected, (kernel["text"], kernel["accesses"])
        assert all(len(access["shape"]) <= PROFILE.value("slice_max_rank") for access in kernel["accesses"])
        assert "int64" not in kernel["text"] and "float64" not in kernel["text"]
        assert "for tile in range(tl.program_id(0)," in kernel["text"]


@pytest.mark.parametrize("name", sorted(GATHERS))
def test_a_gather_is_found_where_there_is_one(checked, name):
    verdicts = {access["verdict"] for kernel in checked[name]["kernels"] for access in kernel["accesses"]}
    assert "gather" in verdicts


@pytest.mark.parametrize("name", VENDOR)
def test_what_the_card_is_slow_at_stays_a_call(checked, name):
    assert VENDOR[name] in checked[name]["calls"]


def test_a_tensor_beyond_32_bit_offsets_is_refused_and_never_wrapped(checked):
    error = checked["too_large"]["error"]
    assert "LegalityError" in error and "2800000000 elements" in error and "smaller batch" in error


def test_a_scan_stays_a_call(checked):
    assert "aten.cumsum.default" in checked["largest"]["calls"]


def test_64_bit_tensors_are_cast_at_the_border_by_a_call(checked):
    assert checked["embedding"]["calls"].count("prims.convert_element_type.default") == 1
    # An int64 result is handed back as int64.
    assert checked["int_arithmetic"]["calls"].count("prims.convert_element_type.default") == 3


def test_a_row_lookup_is_a_slice_per_row(checked):
    """The index is loaded as a scalar, so that the rest of its address is affine."""
    (kernel,) = checked["embedding"]["kernels"]
    assert [a["verdict"] for a in kernel["accesses"]] == ["scalar dma", "dma slice", "dma slice"]


def test_a_column_reduction_adds_rows_up_and_never_reduces_a_strided_tile(checked):
    (kernel,) = checked["column_sum"]["kernels"]
    assert "tl.sum" not in kernel["text"] and "for r0_tile in range(0, 50)" in kernel["text"]


def test_half_a_rotation_is_a_mask_along_one_dimension(checked):
    (kernel,) = checked["rotary"]["kernels"]
    assert not [f for f in kernel["findings"] if f["rule"] == "mask-full-compare"]
