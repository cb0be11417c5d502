"""Building host kernels: cached, atomic, and honest about what is missing."""

import os
import platform
import subprocess
import sys
import threading

import pytest
import torch

import gcu_compile.kernels.sampling  # noqa: F401  (defines the operation)
from gcu_compile import cxx
from gcu_compile.errors import KernelBuildError
from gcu_compile.kernels import registry
from gcu_compile.kernels.host import build


@pytest.fixture(autouse=True)
def forget():
    """Libraries loaded by other tests are not looked at here, and these not there."""
    forget_libraries()
    yield
    forget_libraries()


def forget_libraries():
    build._load.cache_clear()
    build._load_for.cache_clear()


def libraries(folder):
    return sorted((folder / "host").glob("*.so"))


@pytest.mark.parametrize("isa", build.ISA_FLAGS)
@pytest.mark.parametrize("name", sorted(source.stem for source in build.HERE.glob("*.cpp")))
def test_every_library_builds_for_every_instruction_set(name, isa, tmp_path, monkeypatch):
    """A kernel that does not build falls back to its meaning, which is right, so that other tests may not notice."""
    if isa in build.available():
        monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
        assert build.load(name)
    elif platform.machine() in ("x86_64", "AMD64"):  # to compile for a CPU does not take one
        flags = (*build.FLAGS, *build.isa_flags(isa), "-O1")
        build._compile(build.find_compiler(), flags, build.HERE / f"{name}.cpp", tmp_path / f"{name}.so")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 is x86's")
@pytest.mark.parametrize("name", sorted(source.stem for source in build.HERE.glob("*.cpp")))
def test_every_library_builds_for_avx512_without_its_extensions(name, tmp_path):
    """Such CPUs have no bfloat16 products; what is written for those is compiled all the same, and never called."""
    flags = (*build.FLAGS, *build.ISA_FLAGS["avx512"], "-O1")
    build._compile(build.find_compiler(), flags, build.HERE / f"{name}.cpp", tmp_path / f"{name}.so")


@pytest.mark.skipif("avx512" not in build.available(), reason="this CPU has no AVX-512")
def test_vbmi2_is_used_where_the_cpu_has_it_and_changes_no_token(tmp_path, monkeypatch):
    """Of 16-bit logits both ways find those from a value on; a CPU without it takes the other one."""
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", "avx512")
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 50021, generator=generator) * 3).bfloat16()
    settings = {"temperature": torch.ones(6), "top_p": torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999])}
    tokens, names = [], set()
    for folder, has in (("without", False), ("as here", capabilities.get("avx512_vbmi2", False))):
        changed = {**capabilities, "avx512_vbmi2": has}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda changed=changed: changed, raising=False)
        assert ("-mavx512vbmi2" in build.isa_flags("avx512")) == has
        monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path / folder))
        forget_libraries()
        tokens.append(torch.ops.gcu.sample(x, torch.arange(6), torch.arange(6), **settings))
        names |= {library.name for library in libraries(tmp_path / folder)}
    assert torch.equal(*tokens)
    assert len(names) == (2 if has else 1)


def test_second_load_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", "portable")
    build.load("sample")
    (library,) = libraries(tmp_path)
    forget_libraries()
    monkeypatch.setattr(build, "_compile", lambda *a: pytest.fail("built again"))
    build.load("sample")
    assert libraries(tmp_path) == [library]


def test_damaged_library_is_built_again_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", "portable")
    monkeypatch.setattr(build, "_compile", lambda compiler, flags, source, library: library.write_bytes(b"half"))
    with pytest.raises(OSError):
        build.load("sample")
    monkeypatch.undo()
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", "portable")
    assert build.load("sample").gcu_sample
    assert "is damaged" in caplog.text


def test_unwritable_cache_is_left_alone_with_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", "portable")
    assert build.load("sample").gcu_sample
    assert "cannot be written" in caplog.text
    assert (tmp_path / "file").read_text() == "not a folder"


def test_without_a_compiler_the_meaning_runs_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match="install g\\+\\+, or name one in the variable CXX"):
        build.load("sample")
    registry.fallbacks.clear()
    zero = torch.zeros(1, dtype=torch.int64)
    assert torch.ops.gcu.sample(torch.tensor([[0.0, 2.0, 1.0]]), zero, zero).tolist() == [1]
    ((_, reason),) = registry.fallbacks
    assert "no C++ compiler" in reason


def test_source_that_does_not_compile_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "broken.cpp").write_text("int main( {")
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(KernelBuildError, match=r"broken.cpp failed: .*error"):
        build.load("broken")
    assert list((tmp_path / "cache" / "host").iterdir()) == []


def test_two_processes_at_once(tmp_path):
    code = "from gcu_compile.kernels.host import build; print(bool(build.load('sample').gcu_sample))"
    env = {**os.environ, "GCU_COMPILE_CACHE_DIR": str(tmp_path), "GCU_COMPILE_HOST_ISA": "portable"}
    pair = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in pair] == [b"True", b"True"]
    assert len(libraries(tmp_path)) == 1


def test_what_is_built_ahead_is_waited_for_and_built_once(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    (tmp_path / "broken.cpp").write_text("int main( {")
    begun, go, built = threading.Event(), threading.Event(), []

    def compile_library(compiler, flags, source, library):
        built.append(source.stem)
        begun.set()
        assert go.wait(60)
        cxx.compile_library(compiler, flags, source, library)

    monkeypatch.setattr(build, "_compile", compile_library)
    ahead = build.load_ahead("answer", "broken")
    assert begun.wait(60)
    threading.Timer(0.2, go.set).start()
    assert build.load("answer").answer() == 42 and go.is_set()
    ahead.join()
    assert built == ["answer", "broken"]
    with pytest.raises(KernelBuildError, match="broken.cpp failed"):
        build.load("broken")


def test_a_changed_header_is_another_library(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setenv("GCU_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "answer.cpp").write_text('#include "inner/answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (tmp_path / "inner").mkdir()
    for value in (41, 42):
        (tmp_path / "inner" / "answer.h").write_text(f"#define ANSWER {value}\n")
        forget_libraries()
        assert build.load("answer").answer() == value
