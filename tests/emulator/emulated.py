"""Runs tests on an emulated card, in one process beside pytest's: PyTorch's private device type is filled once.

    @on_card                # or on_card("gcu400")
    def test_something():
        torch.ones(3, device="gcu")
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

CARD_BYTES = 1 << 30


@functools.cache
def process(target: str) -> ProcessPoolExecutor:
    """The process that emulates `target`, started at its first use."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(target,))


def _start(target: str) -> None:
    import torch  # noqa: F401  (before the variable, which would start a card with the default memory)

    os.environ["GCU_COMPILE_EMULATE"] = target
    from gcu_compile.targets import emulator

    emulator.start(target, _profile_file())


def _profile_file() -> str:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        file.write(f"dram_bytes: {CARD_BYTES}\n")
    return file.name


def _call(module: str, name: str, arguments: dict) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def on_card(test=None, target: str = "gcu300"):
    """Decorator: the test runs where `torch.device("gcu")` is an emulated `target`. Its arguments are pickled."""
    if isinstance(test, str):
        return functools.partial(on_card, target=test)

    @functools.wraps(test)
    def run(**arguments):
        process(target).submit(_call, test.__module__, test.__name__, arguments).result()

    return run
