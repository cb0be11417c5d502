"""Room for the frames of a step's Python calls, in one piece.

CPython, from 3.11 on, keeps the frames of Python calls in chunks of 16 KiB. A call that does not fit into the chunk
maps a new one, and its return unmaps it: a few us, and with more threads an interrupt of every core that runs one. A
loop that happens to stand at a chunk's end pays that at each call; a model's step of a thousand calls does, or does
not, as deep as the server's own calls and the user's program are. Measured: a step of 15 ms spent 4 of them there.

A frame that does not fit gets a chunk of twice the size, or four times, and so on, and what that frame leaves is there
for those it calls. So a step is called from one frame of a little more than half a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# Slots of 8 bytes: 67 KB, of a chunk of 128 KB. The rest is for some 300 calls within each other.
SLOTS = 8400


def with_room(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose calls of Python functions map no memory for their frames."""

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=SLOTS)
    return functools.update_wrapper(call, function)
