"""Shared libraries from our C++ sources: written aside, then renamed, so that no process meets a half-written one."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from gcu_compile.errors import KernelBuildError

log = logging.getLogger(__name__)


def find_compiler() -> str:
    """Path of `$CXX`, else of g++.

    Raises:
        KernelBuildError: neither is here.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise KernelBuildError("no C++ compiler: install g++, or name one in the variable CXX")
    return compiler


@functools.cache
def version(compiler: str) -> str:
    """The first line of what the compiler says about itself."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def writable(folder: Path) -> Path:
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


def compile_library(compiler: str, flags: tuple[str, ...], source: Path, library: Path) -> None:
    """Compile `source` into `library`; `flags` that name libraries belong behind the source and start with -l.

    Raises:
        KernelBuildError: the compiler refused the source.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as aside:
        new = Path(aside) / library.name
        libraries = [flag for flag in flags if flag.startswith("-l")]
        words = [compiler, *(flag for flag in flags if flag not in libraries), str(source), *libraries]
        result = subprocess.run([*words, "-o", str(new)], capture_output=True, text=True)
        if result.returncode:
            reason = "\n".join(result.stderr.strip().splitlines()[:5])
            raise KernelBuildError(f"{' '.join(words)} failed: {reason}")
        new.replace(library)
