"""Builds a C++ kernel at first use and keeps the library in the cache.

The same source is compiled for the instruction set of this machine; nothing in it is written for one, so the
portable build runs everywhere and gives the same results. A library is written aside, then renamed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from gcu_compile.errors import KernelBuildError
from gcu_compile.options import resolve

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC")
# Option host_isa -> what the compiler is told (psABI levels of x86-64).
ISA_FLAGS = {
    "amx": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}
BY_CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}


def host_isa() -> str:
    """The instruction set that kernels are built for: option `host_isa`, or the best of this CPU.

    Raises:
        KernelBuildError: one was asked for that this CPU lacks.
    """
    best = BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "portable")
    if best == "avx512" and torch.cpu._is_amx_tile_supported():
        best = "amx"
    asked = resolve().host_isa
    if asked == "auto":
        return best
    order = ("portable", "avx2", "avx512", "amx")
    if order.index(asked) > order.index(best):
        raise KernelBuildError(f"host_isa {asked!r} is not available on this CPU; the best here is {best!r}")
    return asked


def load(name: str) -> ctypes.CDLL:
    """The library of `<name>.cpp`, built if the cache has none for this source, compiler and instruction set.

    Raises:
        KernelBuildError: no g++ (or `CXX`), or it refused the source.
    """
    return _load(name, host_isa(), str(resolve().effective_cache_dir()))


@functools.cache
def _load(name: str, isa: str, cache_dir: str) -> ctypes.CDLL:
    source = HERE / f"{name}.cpp"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise KernelBuildError("no C++ compiler: install g++, or name one in the variable CXX")
    flags = (*FLAGS, *(ISA_FLAGS[isa] if platform.machine() in ("x86_64", "AMD64") else ()))
    key = hashlib.sha256(source.read_bytes() + repr((flags, _version(compiler))).encode()).hexdigest()[:20]
    library = _writable(Path(cache_dir) / "host") / f"{name}-{isa}-{key}.so"
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            log.warning("%s is damaged (%s); it is built again", library, error)
    _compile(compiler, flags, source, library)
    return ctypes.CDLL(str(library))


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def _writable(folder: Path) -> Path:
    """`folder`, or one for this process alone where that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning("Cache folder %s cannot be written (%s); kernels are built for this process only", folder, error)
        return _own_folder()


@functools.cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="gcu_compile_"))


def _compile(compiler: str, flags: tuple[str, ...], source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as aside:
        new = Path(aside) / library.name
        words = [compiler, *flags, str(source), "-o", str(new)]
        result = subprocess.run(words, capture_output=True, text=True)
        if result.returncode:
            reason = "\n".join(result.stderr.strip().splitlines()[:5])
            raise KernelBuildError(f"{' '.join(words[:-2])} failed: {reason}")
        new.replace(library)
