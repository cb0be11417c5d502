"""Inductor's question whether a probe library loads is asked once, not once per process."""

import os

import pytest

from gcu_compile import torch_private

vec_isa = pytest.importorskip("torch._inductor.cpu_vec_isa").VecISA
pytestmark = pytest.mark.skipif(not hasattr(vec_isa, "_probe_load"), reason="torch before 2.12 has no such probe")


@pytest.fixture
def asked(monkeypatch):
    """Libraries that torch's own probe was asked about; those named `bad...` do not load."""
    seen = []

    def probe(isa, library):
        seen.append(os.path.basename(library))
        return not os.path.basename(library).startswith("bad")

    monkeypatch.setattr(vec_isa, "_probe_load", probe)
    torch_private.remember_isa_probes()
    return seen


def test_a_library_that_loads_is_asked_about_once(asked, tmp_path):
    library = tmp_path / "good.so"
    library.touch()
    assert [vec_isa._probe_load(None, str(library)) for _ in range(3)] == [True] * 3
    assert asked == ["good.so"]


def test_a_library_that_does_not_load_is_asked_again(asked, tmp_path):
    library = tmp_path / "bad.so"
    library.touch()
    assert [vec_isa._probe_load(None, str(library)) for _ in range(2)] == [False] * 2
    assert asked == ["bad.so"] * 2


def test_a_library_built_anew_is_asked_again(asked, tmp_path):
    library = tmp_path / "good.so"
    library.touch()
    assert vec_isa._probe_load(None, str(library))
    mark = tmp_path / "good.so.loads"
    os.utime(mark, (1, 1))
    assert vec_isa._probe_load(None, str(library))
    assert asked == ["good.so"] * 2


def test_it_is_put_in_place_once(asked):
    first = vec_isa._probe_load
    torch_private.remember_isa_probes()
    assert vec_isa._probe_load is first
