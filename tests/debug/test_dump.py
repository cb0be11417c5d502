"""The dump: ordered, the same for two compilations of one model, the same for a cache hit as for a miss."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from gcu_compile import backend
from gcu_compile.cli.main import app
from gcu_compile.debug import dump, page
from gcu_compile.debug.text import Symbols
from gcu_compile.lowering import pipeline

CASE = '''
import torch


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.nn.functional.silu(self.up(x)).float().bfloat16().float()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return torch.ops.gcu.sample(x, x.new_zeros(x.shape[0]).long(), x.new_zeros(x.shape[0]).long())


def case():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 8)
    torch._dynamo.mark_dynamic(x, 0)

    def fn(x):
        with torch.no_grad():
            return model(x)

    return fn, (x,)
'''
STAGES = ["input", *(step for step in pipeline.STEPS if step not in pipeline.WHOLE), "inductor"]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    file = tmp_path_factory.mktemp("case") / "case.py"
    file.write_text(CASE)
    return f"{file}:case"


@pytest.fixture(scope="module")
def dumps(subject, tmp_path_factory):
    """Two misses in two processes, the second followed by a hit."""
    root = tmp_path_factory.mktemp("dumps")
    for name, cache in (("first", "one"), ("second", "two"), ("hit", "two")):
        words = ["dump", subject, "--dir", str(root / name), "--set", f"cache_dir={root / cache}"]
        words += ["--json", str(root / f"{name}.json")]
        run = subprocess.run(
            [sys.executable, "-m", "gcu_compile.cli.main", *words], capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip().endswith("index.html")
    return root


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_folder_is_ordered(dumps):
    names = [f"{n:02}-{stage}.txt" for n, stage in enumerate(STAGES)] + [f"{len(STAGES):02}-code.py"]
    names += ["about.json", "kernels.json", "origins.json", "timing.json"]
    assert sorted(files(dumps / "first")) == sorted(["index.html", *(f"graph-000/{name}" for name in names)])


def test_two_dumps_of_a_model_are_identical_but_for_the_times(dumps):
    first, second = files(dumps / "first"), files(dumps / "second")
    assert first.keys() == second.keys()
    different = {name for name in first if first[name] != second[name]}
    assert different <= {"graph-000/timing.json", "index.html"}
    pages = [page.data(dumps / name) for name in ("first", "second")]
    for one in pages:
        del one["graphs"][0]["timing"]
    assert pages[0] == pages[1]


def test_a_hit_dumps_the_same_as_the_miss(dumps):
    assert files(dumps / "second") == files(dumps / "hit")


def test_lines_name_layer_source_and_symbols(dumps):
    text = (dumps / "first" / "graph-000" / "00-input.txt").read_text()
    assert "f32[s0, 8]" in text and "# layers.1.up  case.py:11" in text
    assert str(dumps) not in text and "0x" not in text


def test_calls_know_their_nodes_and_model_lines(dumps):
    (graph,) = page.data(dumps / "first")["graphs"]
    by = {call["kernel"]: call for call in graph["calls"]}
    assert by["gcu::sample"]["by"] == "hand-written"
    first = next(call for call in graph["calls"] if call["by"] == "inductor")
    places = [graph["origins"][name] for name in first["nodes"]]
    assert {"layers.0"} <= {place["layer"] for place in places}
    assert any("silu(self.up(x))" in place["line"] for place in places)
    start, end = graph["definitions"][first["kernel"]]
    assert "cpp_pybinding" in graph["code"][start - 1] and graph["code"][end - 1].startswith("'''")


def test_without_inductor_there_is_no_code(tmp_path):
    dump.dump(lambda x: x.view(x.shape).sin(), torch.ones(2, 2), directory=tmp_path, options={"inductor": False})
    (graph,) = page.data(tmp_path)["graphs"]
    assert graph["code"] == [] and [stage["name"] for stage in graph["stages"]] == STAGES[:-1]
    assert graph["stages"][1]["changes"] and graph["stages"][2]["changes"] is None


def test_graphs_of_one_process_are_numbered_and_backward_ones_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_DUMP", str(tmp_path))
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    x = torch.ones(4, requires_grad=True)
    torch.compile(lambda x: (x.sin() * x).sum(), backend="gcu")(x).backward()
    assert backend.recordings[-1].state == "miss"
    graphs = page.data(tmp_path)["graphs"]
    assert [graph["folder"] for graph in graphs] == ["graph-000", "graph-001"]
    assert not any(graph["inference"] for graph in graphs) and all(graph["code"] for graph in graphs)


def test_command_replaces_an_older_dump_and_nothing_else(tmp_path, subject):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "graph-007").mkdir()
    words = ["dump", subject, "--dir", str(tmp_path), "--set", "inductor=0"]
    for _ in range(2):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == ["graph-007", "graph-008", "index.html", "notes.txt"]


def test_symbols_are_numbered_by_first_appearance():
    symbols = Symbols()
    assert symbols.normalise("s77 + s12*u9 - s77") == "s0 + s1*u0 - s0"
    assert symbols.normalise("s12 at 0x7f00aa11bb22") == "s1 at 0x"
    path = "/tmp/torchinductor_me/xy/" + "c" * 51 + ".main.h"
    assert symbols.normalise(f'#include "{path}"') == '#include "<cache>/file.main.h"'


def test_nothing_of_it_runs_when_it_is_off(tmp_path):
    code = (
        "import sys, torch; off = {'inductor': False};"
        "torch.compile(lambda x: x.sin() + 1, backend='gcu', options=off)(torch.ones(2));"
        "print([m for m in sys.modules if m.startswith('gcu_compile.debug.')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "[]", run.stderr


def test_json_of_the_command_is_the_page_s_data(dumps):
    assert json.loads((dumps / "first.json").read_text()) == page.data(dumps / "first")
