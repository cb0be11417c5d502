"""A hit tells the same as a miss; damaged entries are misses with a reason; processes do not disturb each other."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from gcu_compile import backend, recording
from gcu_compile.cache.doctor import diagnose
from gcu_compile.cache.store import Entry, Store
from gcu_compile.errors import UnknownNameError


def fn(x):
    return torch.ops.aten.slice(x.float().bfloat16().sin(), 0, 0, 2**62) * 2


X = torch.arange(6, dtype=torch.bfloat16)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """compiled(fn) -> the recording of compiling it in a cache of this test's own."""
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path / "cache"))

    def run(function=fn, x=X, **options):
        torch.compiler.reset()
        recording.restart_numbers()
        with torch.no_grad():
            assert torch.equal(torch.compile(function, backend="gcu", options=options)(x), function(x))
        return backend.recordings[-1]

    return run


def told(recording):
    return [asdict(report) for report in recording.reports], recording.kernels, recording.seconds


def test_a_hit_tells_the_same_as_a_miss(compiled):
    miss, hit = compiled(), compiled()
    assert (miss.state, hit.state) == ("miss", "hit")
    assert miss.reason == "no entry with this key" and hit.reason == ""
    assert told(miss) == told(hit) and miss.reports[0].steps and miss.kernels[0]
    assert backend.reports[-1] == miss.reports[0]


def test_off_keeps_nothing(compiled, tmp_path):
    for options in ({"cache": False}, {"inductor": False}):
        recording = compiled(**options)
        assert recording.state == "off" and recording.reason and recording.reports
    assert not (tmp_path / "cache" / "graphs").exists()


def damage_cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def damage_bit(file):
    raw = bytearray(file.read_bytes())
    raw[-30] ^= 4
    file.write_bytes(raw)


def damage_empty(file):
    file.write_bytes(b"")


def damage_schema(file):
    head, _, body = file.read_bytes().partition(b"\n")
    file.write_bytes(json.dumps(json.loads(head) | {"schema": 0}).encode() + b"\n" + body)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_cut, "checksum"),
        (damage_bit, "checksum"),
        (damage_empty, "damaged"),
        (damage_schema, "schema 0, not 1"),
        (lambda file: file.unlink(), "no entry"),
    ],
)
def test_a_damaged_entry_is_a_miss_with_a_reason(compiled, tmp_path, damage, reason):
    first = compiled()
    damage(Store(tmp_path / "cache").path(first.key))
    again = compiled()
    assert again.state == "miss" and reason in again.reason
    assert again.key == first.key and again.reports[0].matches == first.reports[0].matches
    assert compiled().state == "hit"


def test_lost_code_is_a_miss_with_a_reason(compiled, tmp_path, monkeypatch):
    compiled()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    again = compiled()
    assert again.state == "miss" and "Inductor's own cache" in again.reason


@torch._dynamo.allow_in_graph
def opaque(x):
    return x.sin()


def test_a_bypass_of_autograds_cache_is_a_miss_with_a_reason(compiled, tmp_path):
    """torch looks a graph up only if it knows all that the graph calls."""
    first, again = (compiled(lambda x: opaque(x) * 2) for _ in range(2))
    assert (first.state, again.state) == ("miss", "miss") and first.key == again.key
    assert first.reason.startswith("no entry with this key; AOTAutograd's cache was bypassed: Unsupported")
    assert again.reason.startswith("AOTAutograd's cache was bypassed: Unsupported") and "opaque" in again.reason
    assert again.reports[0].matches == first.reports[0].matches and again.kernels == first.kernels
    entries, _ = Store(tmp_path / "cache").entries()
    assert [entry.bypass for entry in entries] == [again.reason]
    assert f"a miss every time: {again.reason}" in str(diagnose(entries[0], entries))


def test_a_cache_that_is_switched_off_in_torch_is_named(compiled):
    with torch._functorch.config.patch(enable_autograd_cache=False):
        reasons = [compiled().reason for _ in range(2)]
    assert reasons[1] == "AOTAutograd's cache is switched off" and reasons[0].endswith(f"; {reasons[1]}")
    assert compiled().reason == "Inductor's own cache has no code for this key"
    assert compiled().state == "hit"


def test_backward_graphs_are_kept_too(compiled):
    found = []
    for _ in range(2):
        torch.compiler.reset()
        x = torch.ones(4, requires_grad=True)
        torch.compile(lambda x: (x.sin() * x).sum(), backend="gcu")(x).backward()
        found.append(backend.recordings[-1])
    miss, hit = found
    assert (miss.state, hit.state) == ("miss", "hit")
    assert len(miss.reports) == 2 and told(miss)[:2] == told(hit)[:2]


def test_a_folder_that_cannot_be_written_is_no_error(compiled, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert compiled().state == "miss"
    assert "cannot be written" in caplog.text


def test_doctor_names_the_ingredient(compiled, tmp_path):
    first = compiled()
    second = compiled(disable_rules=["dtype_round_trip"])
    compiled(lambda x: x + 1)
    store = Store(tmp_path / "cache")
    entries, damaged = store.entries()
    assert len(entries) == 3 and not damaged
    found = diagnose(store.find(second.key[:8]), entries)
    assert found.nearest == first.key and list(found.changed) == ["options.disable_rules"]
    assert diagnose(store.find(first.key), entries).nearest == ""
    with pytest.raises(UnknownNameError, match="cache entry"):
        store.find("zz")


WRITER = """
import sys
from pathlib import Path
from gcu_compile.cache.store import Entry, Store
store = Store(Path(sys.argv[1]))
kernels = [[{"n": i} for i in range(500)]]
for n in range(60):
    store.save(Entry("k", {"graph": {"name": "g"}}, seconds={"total": float(n)}, kernels=kernels))
    entry, reason = store.load("k")
    assert entry is not None, reason
"""


def test_processes_do_not_disturb_each_other(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(3)]
    store = Store(tmp_path)
    while any(writer.poll() is None for writer in writers):
        entry, reason = store.load("k")
        assert entry is not None or reason == "no entry with this key", reason
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert not list(store.folder.glob(".aside-*"))


def test_clear(tmp_path):
    store = Store(tmp_path)
    assert store.clear() == 0
    store.save(Entry("k", {"graph": {"name": "g"}}))
    assert store.clear(older_than=3600) == 0 and store.clear() == 1 and store.entries() == ([], {})
