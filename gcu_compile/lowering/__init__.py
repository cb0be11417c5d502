"""Graph to graph: the pipeline of named steps, the rules, the invariants.

`pipeline.lower(graph_module, context)` works in place on a functional post-grad ATen graph.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def source_hash() -> str:
    """Hash of every source file that decides what lowering and kernels do; an ingredient of cache keys."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("lowering", "kernels"):
        for file in sorted((package / folder).rglob("*")):
            if file.suffix in {".py", ".cpp", ".h"}:
                digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
