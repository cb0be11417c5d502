"""Tests that need the emulated card import `emulated`, which runs them in a process of its own."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
