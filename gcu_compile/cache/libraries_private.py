"""Inductor's C++ files that a killed compile left half-written are built again, with a reason in the log.

g++ writes a library, an object file and a precompiled header where Inductor looks for them. One that was killed on the
way (memory, a timeout, a full disk) leaves a part of it, which Inductor takes for the whole: at every later start the
load fails ("file too short"), ends the process (SIGBUS: a mapped page that no file stands behind), or, with a part of a
header, every compilation fails.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gcu_compile.cxx import what_is_missing

log = logging.getLogger(__name__)
# What g++ says of a precompiled header that it cannot take, and of the plain one that it then reads twice.
BROKEN_HEADER = ("PCH", "precompiled header", ".gch", "redefinition of")


def mend_libraries() -> None:
    """Let Inductor look at what its cache holds before it loads it. Idempotent.

    All of its C++ passes through one function, which builds what is not there, in this process, under a file's lock.
    """
    from torch._inductor import codecache

    original = codecache._worker_compile_cpp
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def build(lock_path: str, builders: Sequence[Any]) -> None:
        _remove_parts(lock_path, [Path(builder.get_target_file_path()) for builder in builders])
        try:
            original(lock_path, builders)
        except RuntimeError as error:  # CppCompileError
            if not any(word in str(error) for word in BROKEN_HEADER):
                raise
            options = [getattr(builder, "_build_option", None) for builder in builders]
            named = {getattr(option, "precompiled_header", None) for option in options} - {None}
            headers = [header for name in named if (header := Path(f"{name}.gch")).exists()]
            if not headers:
                raise
            for header in headers:  # the plain header beside it says the same, slower
                log.warning("%s may be damaged: g++ refuses what includes it; removed, and compiled without", header)
                header.unlink(missing_ok=True)
            original(lock_path, builders)

    codecache._worker_compile_cpp = build


def _remove_parts(lock_path: str, files: Iterable[Path]) -> None:
    """Remove those of the files that are there and not whole; they are built next."""
    if not any(map(what_is_missing, files)):
        return
    from torch._inductor.codecache import LOCK_TIMEOUT
    from torch.utils._filelock import FileLock

    with FileLock(lock_path, timeout=LOCK_TIMEOUT):  # another process may be writing it just now
        for file in files:
            if reason := what_is_missing(file):
                log.warning("%s is damaged (%s); it is built again", file, reason)
                file.unlink(missing_ok=True)
