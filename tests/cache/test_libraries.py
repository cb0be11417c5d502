"""What a killed compile leaves of Inductor's C++ files is built again, with a reason."""

import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor import codecache
from torch._inductor.exc import CppCompileError

from gcu_compile.cache.libraries_private import mend_libraries
from gcu_compile.cxx import compile_library, find_compiler, what_is_missing

# Compiles one function, new to all caches, and prints what it gives and the names of the libraries that it needed.
PROGRAM = """
import logging, sys, torch, gcu_compile
from torch._inductor.codecache import CppPythonBindingsCodeCache
logging.basicConfig(level=logging.WARNING)
number = float(sys.argv[1])
with torch.no_grad():
    print(torch.compile(lambda x: (x * 3 + number).sin(), backend="gcu")(torch.zeros(64)).sum().item())
print(*CppPythonBindingsCodeCache.cache)
"""


def run(number):
    """Exit status, what it printed and what it logged, of a fresh process."""
    words = [sys.executable, "-c", PROGRAM, str(number)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=300)
    return run.returncode, run.stdout.split(), run.stderr


def test_a_library_cut_off_is_built_again():
    """A tenth of it, which the loader maps: without the look at it the process ends with SIGBUS."""
    number = random.SystemRandom().random()
    status, first, log = run(number)
    assert status == 0 and "is damaged" not in log, log
    _, key = first
    (library,) = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob(f"{key}.main.so")
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 10])
    status, second, log = run(number)
    assert status == 0 and f"{library.name} is damaged" in log, log
    assert second == first and not what_is_missing(library)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    (folder / "a.cpp").write_text("int answer() { return 42; }\n")
    compile_library(find_compiler(), ("-shared", "-fPIC"), folder / "a.cpp", folder / "a.so")
    return folder / "a.so"


def test_what_is_missing_of_a_library(library, tmp_path):
    whole, part = library.read_bytes(), tmp_path / "a.so"
    assert not what_is_missing(library) and not what_is_missing(part)
    for size in (0, 3, 40, 64, 200, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:size])
        assert what_is_missing(part), size
    part.write_bytes(bytes(64) + whole[64:])  # the linker writes its own header last
    assert what_is_missing(part) == "no ELF header"
    part.rename(tmp_path / "a.gch")  # nothing is known of other files
    assert not what_is_missing(tmp_path / "a.gch")


class Builder:
    """As much of Inductor's `CppBuilder` as its build function uses; `fails` while the header is there."""

    def __init__(self, target: Path, says: str = ""):
        self.target, self.says = target, says
        self._build_option = self
        self.precompiled_header = str(target.with_name("header.h"))
        self.header = Path(f"{self.precompiled_header}.gch")
        self.built = 0

    def get_target_file_path(self):
        return str(self.target)

    def build(self):
        if self.says and self.header.exists():
            raise CppCompileError(["g++"], self.says)
        self.built += 1
        self.target.write_bytes(b"new")


def build(builder):
    mend_libraries()
    codecache._worker_compile_cpp(str(builder.target.with_name("lock")), (builder,))


def test_a_whole_library_is_left_alone(library, tmp_path):
    builder = Builder(tmp_path / "a.so")
    builder.target.write_bytes(library.read_bytes())
    build(builder)
    assert builder.built == 0 and builder.target.read_bytes() == library.read_bytes()


@pytest.mark.parametrize(
    "says", ["fatal error: cannot read PCH file: No such", "h.gch: too short to be a PCH file", "redefinition of f"]
)
def test_a_broken_precompiled_header_is_removed(tmp_path, caplog, says):
    builder = Builder(tmp_path / "a.so", says)
    builder.header.write_bytes(b"gpch")
    with caplog.at_level(logging.WARNING):
        build(builder)
    assert builder.built == 1 and not builder.header.exists() and "header.h.gch may be damaged" in caplog.text


@pytest.mark.parametrize(("says", "header"), [("error: expected ';'", True), ("cannot read PCH file", False)])
def test_other_errors_of_the_compiler_are_not_ours(tmp_path, says, header):
    """Near misses: source that is wrong, and words of a header where none is."""
    builder = Builder(tmp_path / "a.so", says)
    if header:
        builder.header.write_bytes(b"gpch")
    else:
        builder.header = tmp_path  # there, and nothing that g++ was told to include
    with pytest.raises(CppCompileError):
        build(builder)
    assert builder.built == 0 and builder.header.exists()
