"""The device type `gcu`: what stands behind it in this process, and Inductor's registrations for it.

    register("gcu300")                the emulated card, else torch_gcu's device, else FakeTensors only
    adopt(Runtime("emulated", ...))   a device that somebody else has set up

A process has one kind of runtime: PyTorch lets its private device type be named and filled once. The target may
change from one compilation to the next as long as no card stands behind it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from gcu_compile.codegen import device_private
from gcu_compile.errors import TargetUnavailableError, UnknownNameError
from gcu_compile.targets import emulator
from gcu_compile.targets.profile import PROFILES, load_profile
from gcu_compile.targets.select import has_torch_gcu

log = logging.getLogger(__name__)
DEVICE = "gcu"
KINDS = ("fake", "emulated", "card")
# Enflame's two packagings of its Triton backend, and the module by which each is known.
PACKAGINGS = {"triton_gcu": "triton_gcu", "flagtree": "triton.backends.enflame"}


@dataclass(frozen=True)
class Runtime:
    """What stands behind `torch.device("gcu")`.

    kind: `fake` (FakeTensors only: compiles, never runs), `emulated` (host memory), `card` (torch_gcu).
    target: `gcu300` or `gcu400`. module: what `torch.gcu` is. packaging: the installed Triton packaging, "" if none.
    profile_file: YAML that overrides facts of the target; "" for none.
    """

    kind: str
    target: str
    module: Any
    packaging: str = ""
    profile_file: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UnknownNameError("kind of gcu runtime", self.kind, KINDS)
        if self.target not in PROFILES:
            raise UnknownNameError("gcu target", self.target, PROFILES)

    @property
    def profile(self):
        """The target's facts."""
        return load_profile(self.target, self.profile_file)


_current: Runtime | None = None


def current() -> Runtime | None:
    """The runtime of this process; None before `register` or `adopt`."""
    return _current


def register(target: str, profile_file: str = "") -> Runtime:
    """Make `torch.device("gcu")` and Inductor's code generation for it usable. Calling it again is harmless.

    Raises:
        UnknownNameError: no such target.
        TargetUnavailableError: torch_gcu is installed and broken, both Triton packagings are installed, or the
            private device type already belongs to somebody else.
    """
    if _current is not None:
        return adopt(Runtime(_current.kind, target, _current.module, _current.packaging, profile_file))
    if target not in PROFILES:
        raise UnknownNameError("gcu target", target, PROFILES)
    if emulator.card() is not None:
        return adopt(Runtime("emulated", target, torch.gcu, "", profile_file))
    if has_torch_gcu():
        return adopt(Runtime("card", target, _vendor_module(), triton_packaging(), profile_file))
    name = torch._C._get_privateuse1_backend_name()
    if name not in ("privateuseone", DEVICE) or hasattr(torch, DEVICE):
        raise TargetUnavailableError(
            f"PyTorch's private device type is already {name!r} in this process. Compile for {target} in another one."
        )
    module = FakeModule()
    device_private.name_device(DEVICE, module)
    return adopt(Runtime("fake", target, module, "", profile_file))


def adopt(runtime: Runtime) -> Runtime:
    """Tell Inductor about a device that is set up: interface, scheduling, wrapper, launch code.

    Raises:
        TargetUnavailableError: this process already has another kind of runtime.
    """
    global _current
    if _current is not None and _current.kind != runtime.kind:
        raise TargetUnavailableError(
            f"the device type {DEVICE!r} is {_current.kind} in this process and cannot become {runtime.kind}. "
            "Start a new process for it."
        )
    _current = runtime
    rival = device_private.install(DEVICE, runtime)
    if rival:
        log.warning(
            "gcu-compile replaces %s as Inductor's code generator for %r. Set TORCHGCU_INDUCTOR_ENABLE=0 to keep the "
            "vendor's changes to Inductor out altogether.",
            rival,
            DEVICE,
        )
    return runtime


def triton_packaging() -> str:
    """The installed packaging of Enflame's Triton: one of `PACKAGINGS`, or "".

    Raises:
        TargetUnavailableError: both are installed; their compilers would be mixed.
    """
    found = [name for name, module in PACKAGINGS.items() if _exists(module)]
    if len(found) > 1:
        raise TargetUnavailableError(
            f"two Triton packagings are installed: {' and '.join(found)}. Uninstall one, so that one compiler is used."
        )
    return found[0] if found else ""


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _vendor_module() -> Any:
    # The vendor's Inductor port reads this when torch_gcu is imported.
    os.environ.setdefault("TORCHGCU_INDUCTOR_ENABLE", "0")
    try:
        importlib.import_module("torch_gcu")
    except Exception as error:
        raise TargetUnavailableError(
            f"torch_gcu is installed and cannot be imported: {type(error).__name__}: {error}. Repair it, or uninstall "
            "it to compile without a card."
        ) from error
    if not hasattr(torch, DEVICE):
        raise TargetUnavailableError("torch_gcu was imported and did not set up torch.gcu: not a version we know")
    return getattr(torch, DEVICE)


class FakeModule:
    """`torch.gcu` where no device is: enough for FakeTensors, and nothing that pretends to run."""

    def is_initialized(self) -> bool:
        """Nothing has to be."""
        return True

    def is_available(self) -> bool:
        """No card is here."""
        return False

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """No generator to seed."""

    def device_count(self) -> int:
        """FakeTensors live on `gcu:0`."""
        return 1

    def current_device(self) -> int:
        """Of FakeTensors."""
        return 0

    def synchronize(self, device: Any = None) -> None:
        """Nothing is running."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """For autocast."""
        return [torch.float16, torch.bfloat16]
