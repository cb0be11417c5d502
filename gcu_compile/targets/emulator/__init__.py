"""A GCU in host memory: `torch.device("gcu")` without a card, with the card's documented limits.

    GCU_COMPILE_EMULATE=gcu300 python script.py     # any script: PyTorch loads the device by itself
    start("gcu300")                                 # the same from Python, before the first gcu tensor

See docs/emulator.md for what is emulated and what is not.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from gcu_compile.errors import InvalidValueError, TargetUnavailableError, UnknownNameError
from gcu_compile.options import resolve
from gcu_compile.targets.profile import PROFILES, Profile, load_profile

__all__ = ["Card", "card", "start"]
CARDS = 2  # so that the wrong one can be current
VISIBLE = "TOPS_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Card:
    """What is emulated: `target` gcu300 or gcu400, its facts, and how many of them."""

    target: str
    profile: Profile
    count: int


_card: Card | None = None


def card() -> Card | None:
    """What this process emulates; None before `start`."""
    return _card


def start(target: str = "", profile_file: str = "") -> Card:
    """Make `torch.device("gcu")` an emulated card in this process. Calling it again is harmless.

    Args:
        target: `gcu300` or `gcu400`; "": what option `emulate` says.
        profile_file: YAML that overrides facts of the card; "": what option `target_profile` says.

    Raises:
        UnknownNameError: no such target.
        TargetUnavailableError: the private device type of PyTorch is somebody else's, or another card's, already.
        KernelBuildError: the C++ part cannot be built.
    """
    global _card
    import torch  # first: its import starts the card that GCU_COMPILE_EMULATE names

    options = resolve()
    target = target or options.emulate
    if target not in PROFILES:
        raise UnknownNameError("emulated card", target, PROFILES)
    if _card is not None:
        if _card.target != target:
            raise TargetUnavailableError(
                f"this process emulates {_card.target} and cannot become {target}: PyTorch's private device type is "
                "filled once. Start a new process."
            )
        return _card
    name = torch._C._get_privateuse1_backend_name()
    if name != "privateuseone" or hasattr(torch, "gcu"):
        raise TargetUnavailableError(
            f"PyTorch's private device type is already {name!r} in this process: torch_gcu was imported, or a GCU was "
            "compiled for without a card. Start the emulated card in a fresh process, before anything else."
        )
    made = Card(target, load_profile(target, profile_file or options.target_profile), len(visible(CARDS)))
    from gcu_compile.targets.emulator import build

    library = ctypes.CDLL(str(build.load()))
    library.gcu_emulator_start(
        ctypes.c_int(made.count),
        ctypes.c_size_t(made.profile.value("dram_bytes")),
        ctypes.c_size_t(made.profile.value("allocator_granule")),
    )
    _card = made
    torch.utils.rename_privateuse1_backend("gcu")
    from gcu_compile.targets.emulator import module

    torch._register_device_module("gcu", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    return made


def visible(count: int) -> list[int]:
    """Which of `count` cards variable TOPS_VISIBLE_DEVICES leaves.

    Raises:
        InvalidValueError: it is no list of different card numbers.
    """
    text = os.environ.get(VISIBLE)
    if text is None:
        return list(range(count))
    try:
        cards = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        cards = [-1]
    if len(set(cards)) != len(cards) or not all(0 <= number < count for number in cards):
        raise InvalidValueError(VISIBLE, text, f"different numbers from 0 to {count - 1}, with commas", "environment")
    return cards
