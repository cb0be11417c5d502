"""How a Triton kernel is launched: on the card if the tensors are on one, else in Triton's interpreter.

Triton is imported at the first launch, so that the kernels' wrappers can be imported without it.
"""

from __future__ import annotations

from typing import Any

import torch

from gcu_compile.errors import KernelBuildError, LegalityError
from gcu_compile.kernels.triton.configs import Config
from gcu_compile.options import resolve
from gcu_compile.targets import emulator
from gcu_compile.targets.profile import PROFILES, load_profile
from gcu_compile.targets.select import gcu_target, has_torch_gcu
from gcu_compile.targets.triton_private import Interpreted


def target_of(tensor: torch.Tensor) -> str:
    """`cuda`, `gcu300` or `gcu400`: whose tile sizes and limits a kernel on this tensor has.

    A CPU tensor belongs to the target option if that names a card, else to gcu300, the strictest.
    """
    if tensor.device.type == "cuda":
        return "cuda"
    asked = resolve().target
    if asked in PROFILES:
        return asked
    return (gcu_target() if tensor.device.type == "gcu" else None) or "gcu300"


def interprets(tensor: torch.Tensor) -> bool:
    """Whether a launch on this tensor runs in Triton's interpreter: on the CPU and on the emulated card."""
    return tensor.device.type != "cuda" and not (tensor.device.type == "gcu" and has_torch_gcu())


def launch(
    kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, exact: bool = False, **constexprs: Any
) -> None:
    """Run `kernel` over `grid` with a configuration's warps and stages.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs in x, y, z.
        config: its warps and stages; its tile sizes are the caller's to pass.
        args, constexprs: the kernel's arguments.
        exact: the kernel needs a * b + c to round twice (`double_single.py`).

    Raises:
        KernelBuildError: Triton is missing or refuses the kernel.
        LegalityError: the grid is beyond what the card takes.
    """
    tensor = next(value for value in args if isinstance(value, torch.Tensor))
    _check_grid(grid, target_of(tensor))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if exact:
        options["enable_fp_fusion"] = False
    if tensor.device.type == "gcu" and emulator.card() is not None:
        from gcu_compile.targets.emulator.launch import launch as launch_emulated

        launch_emulated(kernel, grid, *args, num_warps=config.num_warps, num_stages=config.num_stages, **constexprs)
        return
    if interprets(tensor):
        Interpreted(kernel)[grid](*args, **constexprs)
        return
    try:
        # A kernel launched with another device current hangs on a GCU.
        with torch.get_device_module(tensor.device).device(tensor.device):
            kernel[grid](*args, **constexprs, **options)
    except ImportError as error:
        raise KernelBuildError(f"a kernel needs Triton 3.6 or newer: {error}") from error


def _check_grid(grid: tuple[int, ...], target: str) -> None:
    most = load_profile(target).value("grid_max") if target in PROFILES else (2**31 - 1, 65535, 65535)
    for axis, size, limit in zip("xyz", grid, most, strict=False):
        if size > limit:
            raise LegalityError(f"{size} programs in {axis}; {target} takes at most {limit}")


def missing() -> str | None:
    """The reason why no Triton kernel can run here, or None."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 6) else f"Triton {triton.__version__} is older than 3.6"


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`: what `tl.arange` takes."""
    return max(least, 1 << max(0, size - 1).bit_length())
