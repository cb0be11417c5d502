"""Shared libraries from our C++ sources: written aside, then renamed, so that no process meets a half-written one."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from gcu_compile.errors import KernelBuildError

log = logging.getLogger(__name__)
# The header of a 64-bit ELF file, little-endian (System V ABI, gabi "ELF Header"): e_ident, then e_phoff, e_shoff,
# e_phentsize, e_phnum, e_shentsize, e_shnum; and p_offset, p_filesz of a program header.
ELF_HEADER = struct.Struct("<16s 16x Q Q 4x 2x H H H H 2x")
ELF_64_BIT = 2  # e_ident[EI_CLASS]
ELF_SEGMENT = struct.Struct("<8x Q 16x Q 16x")


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


def what_is_missing(library: Path) -> str:
    """Why a library or an object file cannot be whole; "" if it is, if it is not there, or if that cannot be told.

    Loading a part of one may end the process (SIGBUS): the loader maps pages that the file does not have. A part has
    no ELF header yet, or one whose tables and segments reach past the end of the file. 64-bit files on Linux only.
    """
    if not sys.platform.startswith("linux") or sys.byteorder != "little" or library.suffix not in (".so", ".o"):
        return ""
    try:
        with library.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(ELF_HEADER.size)
            if len(head) < ELF_HEADER.size or not head.startswith(b"\x7fELF"):
                return "no ELF header"
            if head[4] != ELF_64_BIT:
                return ""
            _, segments, sections, segment_size, segment_count, section_size, section_count = ELF_HEADER.unpack(head)
            file.seek(segments)
            table = file.read(segment_size * segment_count)
    except FileNotFoundError:
        return ""
    if len(table) < segment_size * segment_count:
        return "its table of segments is cut off"
    needs = [sections + section_size * section_count]
    if segment_size >= ELF_SEGMENT.size:
        needs += [sum(ELF_SEGMENT.unpack_from(table, i * segment_size)) for i in range(segment_count)]
    return f"{size} bytes of {max(needs)}" if size < max(needs) else ""
