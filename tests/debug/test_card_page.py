"""The page of a cross-compiled model: its data, and in a browser the sources, verdicts and costs of a chosen kernel."""

import json
import re

import pytest
from test_page import BROWSER, shown
from typer.testing import CliRunner

from gcu_compile.cli.main import app

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    (folder / "config.json").write_text(json.dumps(TINY))
    words = [str(folder / "config.json"), "--tokens", "32", "--graphs", "decode", "--baseline"]
    words += ["--out", str(folder / "out"), "--json", str(folder / "all.json")]
    result = CliRunner().invoke(app, ["cross-compile", *words])
    assert result.exit_code == 0, result.output
    return folder / "out", json.loads((folder / "all.json").read_text())["graphs"]["decode"]


def test_the_page_holds_what_the_json_holds(compiled):
    folder, report = compiled
    text = (folder / "index.html").read_text()
    assert "https://" not in text and "http://" not in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    (graph,) = data["graphs"]
    assert graph["matches"] == report["lowering"]["matches"] and graph["code"] == report["wrapper"].splitlines()
    for part in ("kernels", "calls", "totals"):
        assert graph["card"][part] == report[part]
    assert graph["card"]["baseline"] == report["baseline"]["totals"]
    assert {one["name"] for one in graph["kernels"]} >= {one["name"] for one in report["kernels"]}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the page's data is tested without one")
def test_a_browser_shows_cost_verdicts_sources_and_the_fused_map(compiled):
    folder, report = compiled
    dom = shown(folder, "0/Card")
    wanted = ["predicted", "of bytes in DMA slices", "Inductor's own scheduling of the same graph", "bound"]
    assert [word for word in (*wanted, *(one["name"] for one in report["kernels"])) if word not in dom] == []
    assert "[object" not in dom and "undefined" not in dom and "NaN" not in dom
    assert not re.search(r'role="tab"[^>]*>Steps', dom)
    head, mark, tail = (folder / "index.html").read_text().rpartition("</script>")
    chosen = """
        const rows = [...document.querySelectorAll("tr[data-card]")];
        rows.find((row) => row.textContent.includes("triton_")).click();
    """
    (folder / "chosen.html").write_text(head + chosen + mark + tail)
    dom = shown(folder, "0/Card", "chosen.html")
    wanted = ["@triton.jit", "tt.func public", "The checker's verdict on each access", "dma slice", "Predicted cost"]
    assert [word for word in wanted if word not in dom] == []
    assert "gated_activation" in shown(folder, "0/Fusion")
