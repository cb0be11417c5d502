"""Kernels of AMX on CPUs that have none: they are built as for one that has, and `amx/trap.cpp` runs their tiles."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

import pytest
import torch

from gcu_compile.kernels.host import build
from gcu_compile.options import resolve

HERE = Path(__file__).parent / "amx"
EMULATED = "amx-emulated"


def refusal() -> str | None:
    """Why AMX is not emulated here, or None."""
    if not sys.platform.startswith("linux"):
        return "illegal instructions are caught on Linux only"
    here = build.available()[-1]
    if here != "avx512":
        return "this CPU has AMX" if here == "amx" else "builds for AMX use AVX-512, which this CPU lacks"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    missing = [name for name in ("avx512_vbmi2", "avx512_bf16") if not has.get(name)]
    return f"this CPU lacks {' and '.join(missing)}, which those with AMX have" if missing else None


# What kernels with tiles are tested on, for `use_isa`: all that this CPU has, and AMX in any way.
ISAS = (*build.available(), *(() if refusal() else (EMULATED,)))
TILED = tuple(isa for isa in ISAS if isa in ("amx", EMULATED))  # one, or none
BEST = tuple(dict.fromkeys((build.available()[-1], *TILED)))  # for tests that one instruction set is enough for


@functools.cache
def library(name: str, isa: str) -> ctypes.CDLL:
    """`amx/<name>.cpp`, from the cache of kernels."""
    return build.load_source(HERE / f"{name}.cpp", isa, str(resolve().effective_cache_dir()))


def executed() -> int:
    """Instructions that were emulated in this process."""
    count = library("trap", "avx512").amx_executed
    count.restype = ctypes.c_int64
    return count()


@functools.cache
def standard_error(config: pytest.Config) -> int:
    """A file for what is said before the process ends: pytest would take it, and keep it to itself."""
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return os.dup(2)


@contextlib.contextmanager
def emulated(errors: int = 2):
    """AMX is the best instruction set of this CPU, as `build` sees it, until the end; no library stays behind."""
    trap = library("trap", "avx512")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_has_amx", lambda: True)
        around = trap.amx_begin(errors)
        try:
            yield
        finally:
            trap.amx_end(around)
            build._load.cache_clear()
            build._load_for.cache_clear()
