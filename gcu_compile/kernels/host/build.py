"""Builds a C++ kernel at first use and keeps the library in the cache.

The same source is compiled for the instruction set of this machine; nothing in it is written for one, so the
portable build runs everywhere and gives the same results.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import hashlib
import logging
import platform
import re
import threading
from pathlib import Path

import torch

from gcu_compile.cxx import compile_library as _compile
from gcu_compile.cxx import find_compiler, version, what_is_missing, writable
from gcu_compile.errors import KernelBuildError
from gcu_compile.options import resolve, watched

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
# Results stay those of IEEE arithmetic: the last two only say that nobody reads its exception flags or errno.
FLAGS = (
    *("-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"),
    *("-fno-trapping-math", "-fno-math-errno"),
)
# Option host_isa, each including those before it -> what the compiler is told (psABI levels of x86-64).
# No CPU has AMX without VBMI2.
ISA_FLAGS = {
    "portable": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "amx": ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mavx512vbmi2"),
}
# What decides which library is loaded.
VARIABLES = watched("GCU_COMPILE_HOST_ISA", "GCU_COMPILE_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "CXX")
_in_turn: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)  # for each library
BY_CAPABILITY = {"AVX512": "avx512", "AVX2": "avx2"}


def host_isa() -> str:
    """The instruction set that kernels are built for: option `host_isa`, or the best of this CPU.

    Raises:
        KernelBuildError: one was asked for that this CPU lacks.
    """
    here, asked = available(), resolve().host_isa
    if asked == "auto":
        return here[-1]
    if asked not in here:
        raise KernelBuildError(f"host_isa {asked!r} is not available on this CPU; the best here is {here[-1]!r}")
    return asked


def available() -> tuple[str, ...]:
    """The instruction sets that kernels can be built for and run on here, from `portable` up."""
    best = BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "portable")
    if best == "avx512" and _has_amx():
        best = "amx"
    every = tuple(ISA_FLAGS)
    return every[: every.index(best) + 1]


@functools.cache
def _has_amx() -> bool:
    """Whether this CPU has AMX's tiles and the operating system lets this process use them; asks it to."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def isa_flags(isa: str) -> tuple[str, ...]:
    """What the compiler is told for `isa`: its level, and of the extensions beyond it those that this CPU has."""
    if isa not in ("avx512", "amx"):
        return ISA_FLAGS[isa]
    # A list that not every torch has; without it a slower path is taken.
    more = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has = {
        "-mavx512vnni": torch.cpu._is_vnni_supported(),
        "-mavx512bf16": torch.cpu._is_avx512_bf16_supported(),
        "-mavx512vbmi2": more.get("avx512_vbmi2", False),
    }
    return (*ISA_FLAGS[isa], *(flag for flag, supported in has.items() if supported))


def load(name: str) -> ctypes.CDLL:
    """The library of `<name>.cpp`, built if the cache has none for this source, compiler and instruction set.

    Raises:
        KernelBuildError: no g++ (or `CXX`), or it refused the source.
    """
    return _load_for(name, VARIABLES())


def refusal(name: str) -> str | None:
    """Why the library `name` cannot be had here, or None; it is loaded then."""
    try:
        load(name)
    except KernelBuildError as error:
        return str(error)
    return None


def load_ahead(*names: str) -> threading.Thread:
    """`load`s in a thread of their own, beside other work; one of these names that is needed sooner is waited for.

    An error is left to the `load` that needs the library: it meets the same one, and tells it.
    """

    def run() -> None:
        for name in names:
            try:
                load(name)
            except (KernelBuildError, OSError) as error:
                log.debug("%s is not built ahead: %s", name, error)

    thread = threading.Thread(target=run, name="gcu_compile-kernels")
    thread.start()
    return thread


@functools.cache
def _load_for(name: str, environ: tuple) -> ctypes.CDLL:
    """Reading the options costs more than a small kernel runs: it is done once per environment."""
    with _in_turn[name]:
        return _load(name, host_isa(), str(resolve().effective_cache_dir()))


@functools.cache
def _load(name: str, isa: str, cache_dir: str) -> ctypes.CDLL:
    return load_source(HERE / f"{name}.cpp", isa, cache_dir)


def load_source(source: Path, isa: str, cache_dir: str) -> ctypes.CDLL:
    """The library of any source, for `isa`, whatever this CPU has; kept in `cache_dir` like those of kernels.

    Raises:
        KernelBuildError: no g++ (or `CXX`), or it refused the source.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *(isa_flags(isa) if platform.machine() in ("x86_64", "AMD64") else ()))
    key = hashlib.sha256(_text(source) + repr((flags, version(compiler))).encode()).hexdigest()[:20]
    library = writable(Path(cache_dir) / "host") / f"{source.stem}-{isa}-{key}.so"
    if library.exists():
        reason = what_is_missing(library)
        try:
            if not reason:
                return ctypes.CDLL(str(library))
        except OSError as error:
            reason = str(error)
        log.warning("%s is damaged (%s); it is built again", library, reason)
    _compile(compiler, flags, source, library)
    return ctypes.CDLL(str(library))


def _text(source: Path) -> bytes:
    """A source and the headers beside it that it includes, each once."""
    found: dict[Path, bytes] = {}

    def take(path: Path) -> None:
        if path in found or not path.exists():  # one that is missing is the compiler's to name
            return
        found[path] = path.read_bytes()
        for name in re.findall(rb'^#include "(.+)"', found[path], re.MULTILINE):
            take(path.parent / name.decode())

    take(source)
    return b"".join(found.values())
