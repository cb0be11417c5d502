"""Graph to graph: the pipeline of named steps, the rules, the invariants.

`pipeline.lower(graph_module, context)` works in place on a functional ATen graph.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def source_hashes() -> dict[str, str]:
    """Source file that decides what code is made and what it calls -> its hash; an ingredient of the cache key."""
    package = Path(__file__).resolve().parent.parent
    return {
        str(file.relative_to(package)): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for folder in ("lowering", "kernels", "codegen")
        for file in sorted((package / folder).rglob("*"))
        if file.suffix in {".py", ".cpp", ".h"}
    }
