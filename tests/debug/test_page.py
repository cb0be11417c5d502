"""The page: its data keeps the contract, nothing in it needs a network, and a browser shows every view."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from gcu_compile.debug import dump, page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAYERS = 30


class Layer(torch.nn.Module):
    """A place that fuses and one that nearly does."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).view(x.shape).bfloat16().float().sin()


class Deep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x, "</script><b>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("page")
    model = Deep()
    with torch.no_grad():
        dump.dump(model, torch.ones(2, 4), directory=where, options={"inductor": False})
        dump.dump(lambda x: x.sin() * 2, torch.ones(5), directory=where, options={"cache": False})
    return where


def test_data(folder):
    found = page.data(folder)
    deep, small = found["graphs"]
    assert found["schema"] == page.SCHEMA
    assert len([match for match in deep["matches"] if match["status"] == "near_miss"]) == LAYERS
    after = page_lines(deep, 1)
    assert rebuilt(deep, 1) == after and len(after) < len(page_lines(deep, 0))
    assert small["kernels"][0]["by"] == "inductor" and small["timing"]["parts"]["total"] > 0


def page_lines(graph, index):
    while graph["stages"][index]["lines"] is None:
        index -= 1
    return graph["stages"][index]["lines"]


def rebuilt(graph, index):
    """The stage's lines from the one before and the changes."""
    before, after, result, at = page_lines(graph, index - 1), page_lines(graph, index), [], 0
    for _, a, b, c, d in graph["stages"][index]["changes"]:
        result += before[at:a] + after[c:d]
        at = b
    return result + before[at:]


def test_page_is_one_file_without_addresses(folder):
    text = (folder / "index.html").read_text()
    assert "https://" not in text and "http://" not in text
    assert not re.search(r"<(link|img|iframe)\b|src=|@import|url\(", text)
    assert text.count("</script>") == 2, "data must not end its element"
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(data) == page.data(folder)


def shown(folder, place, name="index.html"):
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    url = f"{(folder / name).as_uri()}#{place}"
    dom = subprocess.run([*words, url], capture_output=True, text=True, timeout=120).stdout
    return re.sub(r"<script.*?</script>", "", dom, flags=re.S)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the page's data is tested without one")
@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("0/Overview", ["noop_view", "near miss", "does not hold every value", "disable_rules"]),
        ("0/Fusion", ["layers.0", "layers.29", "▲"]),
        ("0/Steps", ["The graph before lowering", "canonicalise", "aten.sin.default"]),
        ("1/Code", ["cpp_fused", "x.sin() * 2", "extern"]),
        ("1/Time", ["Inductor scheduling and codegen", "graph-001"]),
    ],
)
def test_a_browser_shows_every_view(folder, place, wanted):
    dom = shown(folder, place)
    assert [word for word in wanted if word not in dom] == []
    assert "[object" not in dom and "undefined" not in dom and "NaN" not in dom


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the page's data is tested without one")
def test_keys_search_and_theme(folder):
    keys = """
        const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const themes = [document.documentElement.dataset.theme];
        ["t", "3", "n", "d", "/"].forEach(press);
        themes.push(document.documentElement.dataset.theme);
        const box = document.getElementById("search");
        box.value = "aten.SIN"; box.dispatchEvent(new Event("input"));
        box.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
        document.title = `${themes.join(">")} ${document.activeElement.id}`;
    """
    head, mark, tail = (folder / "index.html").read_text().rpartition("</script>")
    (folder / "keys.html").write_text(head + keys + mark + tail)
    dom = shown(folder, "0/Overview", "keys.html")
    assert re.search(r"<title>(light&gt;dark|dark&gt;light) search</title>", dom)
    assert f"1 of {LAYERS} found" in dom and "The graph after canonicalise" in dom
    assert re.search(r'aria-selected="true">Steps', dom)
