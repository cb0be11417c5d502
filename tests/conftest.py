"""Shared test settings: the `--slow` switch, and one Inductor cache for all tests that are not about caching."""

import os
import tempfile

import pytest

# One cache per machine user, so that a second run compiles nothing again; set before torch is imported.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"gcu_compile_tests_{os.getuid()}")
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long sweeps whole")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="long sweep: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
