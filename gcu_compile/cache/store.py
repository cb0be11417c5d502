"""What is kept of a compilation: one file per key in `<cache_dir>/graphs`.

Inductor keeps the code, in its own cache; an entry here keeps what the user is told about it, so that a hit
tells the same as a miss. The two are tied by the entry's `generation`, which is part of Inductor's key: code
is found again only by one who holds the entry. A lost, damaged or half-written entry is a miss with a reason.

    first line     {"schema": 1, "sha256": of the rest}
    the rest       the entry as JSON, gzipped

Files are written aside and renamed, so a reader sees a whole file or none. Who changes an entry holds the
folder's lock.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from gcu_compile.errors import UnknownNameError

log = logging.getLogger(__name__)
SCHEMA = 1
LOCK_SECONDS = 30


@dataclass
class Entry:
    """One compilation.

    Attributes:
        key: what it is kept under.
        ingredients: the named list that the key is the hash of.
        generation: part of Inductor's key; a new one means that Inductor cannot find older code.
        created: seconds since 1970.
        layers: paths of the graph's modules, by first appearance.
        reports: `GraphReport.to_json()` of each graph that was lowered for it.
        kernels: what each graph's code calls, see `gcu_compile.generated`.
        seconds: part of the compilation -> wall time.
        dump: the text of every stage, or None when it was compiled without a dump.
        bypass: why torch does not find the code again, so that every compilation is a miss; empty where it does.
    """

    key: str
    ingredients: dict[str, Any]
    generation: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    created: float = field(default_factory=time.time)
    layers: list[str] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[list[dict[str, Any]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    dump: list[dict[str, Any]] | None = None
    bypass: str = ""


class Store:
    """The entries of one cache folder; it is made when the first entry is written."""

    def __init__(self, cache_dir: Path):
        self.folder = Path(cache_dir) / "graphs"

    def path(self, key: str) -> Path:
        """The file of the entry `key`."""
        return self.folder / f"{key}.entry"

    def load(self, key: str) -> tuple[Entry | None, str]:
        """(the entry, "") or (None, why there is none)."""
        try:
            raw = self.path(key).read_bytes()
        except FileNotFoundError:
            return None, "no entry with this key"
        except OSError as error:
            return None, f"the entry cannot be read: {error}"
        head, _, body = raw.partition(b"\n")
        try:
            header = json.loads(head)
            if header["schema"] != SCHEMA:
                return None, f"the entry has schema {header['schema']}, not {SCHEMA}"
            if hashlib.sha256(body).hexdigest() != header["sha256"]:
                return None, "the entry is damaged: its checksum does not match"
            entry = Entry(**json.loads(gzip.decompress(body)))
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            return None, f"the entry is damaged: {type(error).__name__}"
        return (entry, "") if entry.key == key else (None, "the entry is damaged: it holds another key")

    def save(self, entry: Entry) -> None:
        """Write `entry`, over one that is there. A folder that cannot be written is warned of, and no error."""
        body = gzip.compress(json.dumps(asdict(entry), default=str).encode(), compresslevel=1, mtime=0)
        head = json.dumps({"schema": SCHEMA, "sha256": hashlib.sha256(body).hexdigest()}).encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                handle, aside = tempfile.mkstemp(dir=self.folder, prefix=".aside-")
                with os.fdopen(handle, "wb") as stream:
                    stream.write(head + b"\n" + body)
                os.replace(aside, self.path(entry.key))
        except OSError as error:
            log.warning("the compile cache cannot be written, so the next start compiles again: %s", error)

    def entries(self) -> tuple[list[Entry], dict[str, str]]:
        """All whole entries, newest first, and file name -> what is wrong with each of the others."""
        found, damaged = [], {}
        for file in sorted(self.folder.glob("*.entry")):
            entry, reason = self.load(file.stem)
            if entry is None:
                damaged[file.name] = reason
            else:
                found.append(entry)
        return sorted(found, key=lambda entry: -entry.created), damaged

    def find(self, prefix: str) -> Entry:
        """The one entry whose key starts with `prefix`.

        Raises:
            UnknownNameError: none, or more than one; the message lists the keys.
        """
        entries, _ = self.entries()
        found = [entry for entry in entries if entry.key.startswith(prefix)]
        if len(found) != 1:
            raise UnknownNameError("cache entry", prefix, [entry.key[:12] for entry in found or entries])
        return found[0]

    def clear(self, older_than: float = 0.0) -> int:
        """Remove entries (damaged ones too) that were written more than `older_than` seconds ago; how many."""
        if not self.folder.is_dir():
            return 0
        limit, removed = time.time() - older_than, 0
        with self._lock():
            for file in (*self.folder.glob("*.entry"), *self.folder.glob(".aside-*")):
                if file.stat().st_mtime <= limit:
                    file.unlink(missing_ok=True)
                    removed += file.suffix == ".entry"
        return removed

    def _lock(self) -> FileLock:
        return FileLock(self.folder / ".lock", timeout=LOCK_SECONDS)
