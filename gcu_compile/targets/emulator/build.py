"""Builds the emulated device's C++ part against the installed torch, once, into the cache."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch

from gcu_compile.cxx import compile_library, find_compiler, version, what_is_missing, writable
from gcu_compile.options import resolve

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
SOURCES = ("backend.cpp", "fallback.h", "runtime.h", "memory.h")


def load() -> Path:
    """Load the library into PyTorch's dispatcher; built first if the cache has none for this torch and compiler.

    Raises:
        KernelBuildError: no C++ compiler, or it refused the source.
    """
    root = Path(torch.__file__).parent
    compiler = find_compiler()
    flags = (
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}",
        f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-L{root / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    )
    key = hashlib.sha256()
    for name in SOURCES:
        key.update((HERE / name).read_bytes())
    key.update(repr((torch.__version__, torch.version.git_version, flags, version(compiler))).encode())
    folder = writable(resolve().effective_cache_dir() / "emulator")
    library = folder / f"gcu_emulator-torch{torch.__version__}-{key.hexdigest()[:20]}.so"
    if library.exists():
        reason = what_is_missing(library)
        try:
            if not reason:
                torch.ops.load_library(str(library))
                return library
        except OSError as error:
            reason = str(error)
        log.warning("%s is damaged (%s); it is built again", library, reason)
    log.info("Building the emulated gcu device (some 10 seconds, once)")
    compile_library(compiler, flags, HERE / "backend.cpp", library)
    torch.ops.load_library(str(library))
    return library
