"""How far the repacking at load has come: counted per process, told every few seconds, silent when it is quick."""

from __future__ import annotations

import time

from vllm_integration.behaviours import log

EVERY = 5.0  # seconds


class Progress:
    """Layers that were made and layers that are ready."""

    def __init__(self) -> None:
        self.expected, self.ready, self.told = 0, 0, None

    def expect(self) -> None:
        """One more layer was made, and will have weights to prepare."""
        self.expected += 1

    def done(self, name: str) -> None:
        """The layer `name` is ready."""
        self.ready += 1
        now = time.monotonic()
        self.told = now if self.told is None else self.told
        if now - self.told >= EVERY:
            self.told = now
            log.info("Repacking quantised weights: %d of %d layers, last %s", self.ready, self.expected, name)


_progress = Progress()
expect, done = _progress.expect, _progress.done
