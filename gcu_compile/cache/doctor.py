"""Why was it compiled again? The entry that is nearest to another, and the ingredients that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gcu_compile.cache.key import differences
from gcu_compile.cache.store import Entry

FIRST = "the first compilation of this graph in this cache"


@dataclass(frozen=True)
class Diagnosis:
    """Why `entry` was a miss: `nearest`, the older entry most like it, differs in `changed` (ingredient -> old, new).
    `nearest` is empty for the first compilation of its graph. `bypass`: why it will be one again, whatever its key."""

    entry: str
    nearest: str
    changed: dict[str, tuple[Any, Any]]
    bypass: str = ""

    def __str__(self) -> str:
        names = ", ".join(self.changed) or "nothing: an older entry was lost or damaged"
        why = f"differs from {self.nearest[:12]} in {names}" if self.nearest else FIRST
        return f"{self.entry[:12]}: {why}" + (f"; a miss every time: {self.bypass}" if self.bypass else "")


def diagnose(entry: Entry, entries: list[Entry]) -> Diagnosis:
    """Compare `entry` with those that were made before it of the same place in the model's code.

    Entries of the same graph name come first; among them the one with the fewest differing ingredients.
    """
    name = entry.ingredients["graph"]["name"]
    older = [
        (len(changed := differences(other.ingredients, entry.ingredients)), -other.created, other.key, changed)
        for other in entries
        if other.key != entry.key and other.created <= entry.created and other.ingredients["graph"]["name"] == name
    ]
    if not older:
        return Diagnosis(entry.key, "", {}, entry.bypass)
    _, _, key, changed = min(older, key=lambda candidate: candidate[:3])
    return Diagnosis(entry.key, key, changed, entry.bypass)
