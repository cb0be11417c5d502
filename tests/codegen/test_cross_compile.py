"""`gcu-compile cross-compile`: models become legal kernels, from their config alone; the baseline is judged beside."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gcu_compile.cli.main import app
from gcu_compile.errors import GcuCompileError

ROOT = Path(__file__).parent.parent.parent
COMMAND = [str(Path(sys.executable).with_name("gcu-compile")), "cross-compile"]
spec = importlib.util.spec_from_file_location("configs", ROOT / "tests" / "benchmarks" / "configs.py")
configs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(configs)


def run(folder, config, *words):
    file = folder / "config.json"
    file.write_text(json.dumps(config) if isinstance(config, dict) else config)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*COMMAND, str(file), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=280)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm")
    words = ["--layers", "2", "--tokens", "128", "--baseline", "--json", "all.json", "--out", "out"]
    result = run(folder, configs.CONFIGS["SmolLM2-135M"], *words)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, json.loads((folder / "all.json").read_text()), result.stdout


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_every_kernel_is_legal_and_every_byte_a_slice(smollm, graph):
    entry = smollm[1]["graphs"][graph]
    totals = entry["totals"]
    assert (totals["aborts"], totals["errors"], totals["wide"], totals["known_wrong"]) == (0, 0, 0, 0)
    assert totals["dma_share"] > 0.99 and not totals["gathers"]
    assert totals["kernels"] >= 5 and totals["calls"] >= 2 * 5
    assert all(kernel["report"]["legal"] for kernel in entry["kernels"])


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_inductors_own_scheduling_is_the_baseline_and_is_not_legal(smollm, graph):
    totals = smollm[1]["graphs"][graph]["baseline"]["totals"]
    assert totals["wide"] > 0 and totals["errors"] > 0 and totals["dma_share"] < 0.99


def test_the_report_holds_sources_ttir_lowering_and_costs(smollm):
    folder, report, printed = smollm
    assert report["model"] == {"type": "llama", "source": "config.json"} and report["parameters"] > 30e6
    decode = report["graphs"]["decode"]
    assert decode["lowering"]["fused"]["noop_view"] > 0 and decode["lowering"]["counts"]["legalise"]
    for kernel in decode["kernels"]:
        assert "@triton.jit" in kernel["triton"] and "tt.func" in kernel["ttir"]
        assert kernel["cost"]["microseconds"] >= kernel["launches"] * 30
        assert (folder / "out" / "decode" / "kernels" / f"{kernel['name']}.ttir").read_text() == kernel["ttir"]
    assert (folder / "out" / "prefill" / "wrapper.py").read_text() == report["graphs"]["prefill"]["wrapper"]
    products = [c for c in decode["calls"] if c["target"] == "extern_kernels.mm"]
    # Two layers of seven products, and the head: each reads its weight once.
    assert sum(c["count"] for c in products) == 2 * 7 + 1
    parameters = sum(c["count"] * c["inputs"][1][0][0] * c["inputs"][1][0][1] for c in products)
    assert parameters == 2 * (576 * (576 * 2 + 192 * 2) + 3 * 576 * 1536) + 576 * 49152
    text = " ".join(printed.split())
    # In each graph, of two layers: an attention, two norms and the last one, a gate, a rotation of queries and of keys.
    assert text.count("attention x2, rms_norm x5, gated_activation x2, rotary x4") == 2
    assert text.count("Inductor's own scheduling") == 2


def by_hand(layers, context, totals):
    """Milliseconds of Llama-2-7B's decode step, bf16, one sequence: docs/gcu-cost-model.md."""
    weights = layers * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    cache = layers * 2 * context * 4096
    launches = totals["kernel_launches"] + totals["calls"]
    return 2 * (weights + cache) / 672e9 * 1e3 + launches * 30e-3


def decode_of_llama(folder, *words):
    given = ["--tokens", "512", "--graphs", "decode", "--json", "all.json", *words]
    result = run(folder, configs.CONFIGS["Llama-2-7B"], *given)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "all.json").read_text())["graphs"]["decode"]["totals"]


def test_decode_takes_its_bytes_and_its_launches(tmp_path):
    totals = decode_of_llama(tmp_path, "--layers", "2")
    assert totals["microseconds"] / 1e3 == pytest.approx(by_hand(2, 512, totals), rel=0.15)


@pytest.mark.slow
def test_decode_of_all_layers_takes_its_bytes_and_its_launches(tmp_path):
    totals = decode_of_llama(tmp_path)
    assert totals["microseconds"] / 1e3 == pytest.approx(by_hand(32, 512, totals), rel=0.15)


def test_four_bit_weights_are_one_operation_each(tmp_path):
    config = configs.CONFIGS["Llama-2-7B"]
    words = ["--layers", "1", "--tokens", "64", "--weights", "w4a16", "--graphs", "decode", "--json", "all.json"]
    result = run(tmp_path, config, *words)
    assert result.returncode == 0, result.stderr[-3000:]
    entry = json.loads((tmp_path / "all.json").read_text())["graphs"]["decode"]
    counts = {}
    for call in entry["calls"]:
        counts[call["target"]] = counts.get(call["target"], 0) + call["count"]
    assert counts["gcu.dequant_gemm.default"] == 7
    assert entry["totals"]["wide"] == 0 and entry["totals"]["dma_share"] > 0.99


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ({"model_type": "nonesuch"}, [], "no model type 'nonesuch'"),
        ({"hidden_size": 8}, [], "names no model_type"),
        ("{", [], "is not JSON"),
        (configs.CONFIGS["SmolLM2-135M"], ["--target", "gcu30"], "Did you mean 'gcu300'"),
        (configs.CONFIGS["SmolLM2-135M"], ["--graphs", "train"], "Valid: decode, prefill"),
        (configs.CONFIGS["SmolLM2-135M"], ["--weights", "int4"], "unknown weight format 'int4'"),
        (configs.CONFIGS["SmolLM2-135M"], ["--batch", "0"], "batch cannot be 0"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(tmp_path, config, words, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config) if isinstance(config, dict) else config)
    result = CliRunner().invoke(app, ["cross-compile", str(file), *words])
    assert isinstance(result.exception, GcuCompileError) and message in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bf16", "w4a16"])
@pytest.mark.parametrize("name", configs.CONFIGS)
def test_every_benchmark_config_is_legal(tmp_path, name, weights):
    words = ["--layers", "2", "--tokens", "512", "--weights", weights, "--json", "all.json"]
    result = run(tmp_path, configs.CONFIGS[name], *words)
    assert result.returncode == 0, result.stderr[-3000:]
    for entry in json.loads((tmp_path / "all.json").read_text())["graphs"].values():
        totals = entry["totals"]
        assert (totals["aborts"], totals["errors"], totals["wide"], totals["known_wrong"]) == (0, 0, 0, 0)
        assert all(gather["why"] for gather in totals["gathers"])
