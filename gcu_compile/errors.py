"""One error class per mistake. Each message says what is wrong, what would be valid, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DemoModelError",
    "GcuCompileError",
    "InvalidInputError",
    "InvalidValueError",
    "InvariantViolation",
    "KernelBuildError",
    "LegalityError",
    "TargetUnavailableError",
    "UnknownNameError",
    "UnsupportedFeatureError",
]


class GcuCompileError(Exception):
    """Base of every error that this project raises on purpose."""


class UnknownNameError(GcuCompileError, ValueError):
    """A name (option, target, dtype, format, rule ...) that does not exist."""

    def __init__(self, kind: str, name: object, valid: Iterable[str], where: str = ""):
        valid = sorted(valid)
        close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        place = f" (from {where})" if where else ""
        super().__init__(f"unknown {kind} {str(name)!r}{place}.{hint} Valid: {', '.join(valid)}.")
        self.kind, self.name, self.valid = kind, str(name), tuple(valid)


class InvalidValueError(GcuCompileError, ValueError):
    """A known name with a value that it cannot have."""

    def __init__(self, what: str, value: object, expected: str, where: str = ""):
        place = f" (from {where})" if where else ""
        super().__init__(f"{what} cannot be {value!r}{place}: expected {expected}.")


class InvalidInputError(GcuCompileError, ValueError):
    """A kernel was called with tensors that it cannot take; the message names the operation and the argument."""


class TargetUnavailableError(GcuCompileError, RuntimeError):
    """The chosen target has no device or no toolchain here."""


class UnsupportedFeatureError(GcuCompileError, ValueError):
    """A feature that this system refuses on purpose (one of the seven behaviours, say)."""


class CheckpointError(GcuCompileError, ValueError):
    """A model folder or weight file that is missing, truncated or inconsistent."""


class DemoModelError(CheckpointError):
    """The demo model could not be fetched or converted."""


class KernelBuildError(GcuCompileError, RuntimeError):
    """The host compiler is missing or refused one of our kernels."""


class InvariantViolation(GcuCompileError, AssertionError):
    """A lowering step left the graph in a state that an invariant forbids: a bug of ours, not of the user."""


class LegalityError(GcuCompileError, RuntimeError):
    """A kernel or tensor breaks a documented limit of the target device."""
