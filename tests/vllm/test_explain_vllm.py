"""`gcu-compile explain MODEL --through vllm`: the pieces that vLLM compiles, and what they call."""

import json
import os
import subprocess
import sys

import pytest
from tiny import save_llama

pytestmark = pytest.mark.vllm
LAYERS = 4


@pytest.fixture(scope="module", params=["vllm", "gcu"])
def folder(request, tmp_path_factory):
    """A report and a dump of one start, with vLLM's products of unquantised weights or with ours."""
    root = tmp_path_factory.mktemp("explain")
    model = save_llama(root / "model", num_hidden_layers=LAYERS, eos_token_id=None, pad_token_id=None)
    words = ["explain", str(model), "--through", "vllm", "--json", str(root / "report.json")]
    environ = {
        **os.environ,
        "GCU_COMPILE_CACHE_DIR": str(root / "cache"),
        "GCU_COMPILE_DUMP": str(root / "dump"),
        "VLLM_CACHE_ROOT": str(root / "vllm"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "GCU_COMPILE_ATTENTION": "gcu",
        "GCU_COMPILE_LINEAR": request.param,
        "GCU_COMPILE_SHADOW": "float64",
    }
    done = subprocess.run(
        [sys.executable, "-m", "gcu_compile.cli.main", *words], capture_output=True, text=True, env=environ, timeout=400
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (root / "linear.txt").write_text(request.param)
    (root / "shadow.txt").write_text(done.stderr[done.stderr.rfind("Shadow check") :])
    return root


def test_pieces_that_are_alike_share_an_entry(folder):
    report = json.loads((folder / "report.json").read_text())
    states = [graph["state"] for graph in report["cache"]]
    # What stands before the first attention, between two, and after the last; those between are alike.
    assert len(report["graphs"]) == LAYERS + 1
    assert states == ["miss", "miss", *["hit"] * (LAYERS - 2), "miss"]
    assert all(graph["steps"] for graph in report["graphs"])
    # torch's own cache was asked and took every piece: a bypass would be among the reasons.
    assert not any("AOTAutograd" in graph["reason"] for graph in report["cache"])


def test_kernels_and_calls_are_told(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["calls"]["sample: host_cpp"] > 0
    by = {kernel["name"]: kernel["by"] for kernel in report["kernels"]}
    if (folder / "linear.txt").read_text() == "vllm":
        assert {"inductor", "library"} <= set(by.values())
    else:
        assert by["gcu::linear"] == "hand-written" and "inductor" in by.values()
    assert report["error"] is None and report["options"]["dump"]


def test_the_dump_names_each_piece_s_own_layer(folder):
    from gcu_compile.debug import page

    graphs = page.data(folder / "dump")["graphs"]
    layers = {origin["layer"] for graph in graphs for origin in graph["origins"].values()}
    for number in range(LAYERS):
        assert any(f"layers.{number}." in layer for layer in layers)
    assert all(graph["code"] and graph["calls"] for graph in graphs if len(graph["stages"][0]["lines"]) > 20)


def test_norms_and_gates_of_every_layer_are_recognised(folder):
    fused = json.loads((folder / "report.json").read_text())["fused"]
    assert fused["rms_norm"] == 2 * LAYERS + 1 and fused["gated_activation"] == LAYERS and fused["rotary"] == 2 * LAYERS


def test_shadow_check_in_float64_is_over_soon_whatever_the_size_of_the_cache(folder):
    """It copied the whole cache at every call, and did not end."""
    rows = [line.split("│") for line in (folder / "shadow.txt").read_text().splitlines() if "gcu::" in line]
    found = {row[1].strip(): (int(row[5]), int(row[6])) for row in rows}  # calls, breaches
    assert found["gcu::paged_attention"][0] >= LAYERS and found["gcu::sample"][0] > 0
    assert not any(breaches for _, breaches in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("joined", [False, True])
def test_smollm2_fuses_all_thirty_layers(tmp_path, joined):
    from gcu_compile.demo_model import ensure_demo_model

    words = ["explain", str(ensure_demo_model()), "--through", "vllm", "--json", str(tmp_path / "report.json")]
    environ = {
        **os.environ,
        "GCU_COMPILE_CACHE_DIR": str(tmp_path / "cache"),
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "GCU_COMPILE_ATTENTION": "gcu",
        "GCU_COMPILE_ENABLE_RULES": "rope_and_cache" if joined else "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "gcu_compile.cli.main", *words], capture_output=True, text=True, env=environ, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    places = {"rms_norm": 61, "gated_activation": 30, "rotary": 0 if joined else 60, "rope_and_cache": 30 * joined}
    assert {rule: report["fused"].get(rule, 0) for rule in places} == places
    assert len(report["layers"]["gated_activation"]) == 30 and len(report["graphs"]) == 31
    assert report["calls"].get("write_kv: host_cpp", 0) == 0 or not joined
