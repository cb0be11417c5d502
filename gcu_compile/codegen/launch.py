"""How a generated kernel is launched, where Inductor's own launcher would ask for CUDA properties and autotune.

Block sizes, warps and grid were decided when the kernel was written, so that a launch is Triton's own `fn[grid](...)`:
on a card the vendor's packaging compiles and runs it, on an emulated card Triton's interpreter does.
Generated files import this module under the name of Inductor's `triton_heuristics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gcu_compile.targets import emulator

__all__ = ["Launcher", "fixed_config"]
LAUNCH_OPTIONS = ("num_warps", "num_stages")


def fixed_config(
    config: Mapping[str, int], filename: str, triton_meta: Mapping[str, Any], inductor_meta: Mapping[str, Any]
) -> Callable[[Any], Launcher]:
    """Decorator: a `@triton.jit` function as a `Launcher`. The arguments are those of Inductor's decorator."""
    return lambda fn: Launcher(fn, dict(config), dict(triton_meta), dict(inductor_meta), filename)


@dataclass
class Launcher:
    """One kernel, ready to be launched.

    fn: the `@triton.jit` function. config: block sizes, num_warps, num_stages.
    """

    fn: Any
    config: dict[str, int]
    triton_meta: dict[str, Any]
    inductor_meta: dict[str, Any]
    filename: str = field(default="", repr=False)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs in x, y, z."""
        x, y, z = (int(n) for n in self.inductor_meta["fixed_grid"])
        return x, y, z

    @property
    def constexprs(self) -> dict[str, int]:
        """Values of the constexpr arguments."""
        return {name: value for name, value in self.config.items() if name in self.fn.arg_names}

    @property
    def signature(self) -> dict[str, str]:
        """Argument name to Triton type."""
        return dict(self.triton_meta["signature"])

    def run(self, *args: Any, stream: Any = None, **_: Any) -> None:
        """Launch on the current stream of the current device; the wrapper has made both current."""
        options = {name: self.config[name] for name in LAUNCH_OPTIONS}
        if emulator.card() is not None:
            from gcu_compile.targets.emulator.launch import launch

            launch(self.fn, self.grid, *args, **self.constexprs, **options)
            return
        self.fn[self.grid](*args, **self.constexprs, **options)

    # What Inductor calls on its own launchers; nothing is left to do here.

    autotune_cache_info = None  # nothing is tuned

    def set_compile_info(self, *_: Any, **__: Any) -> None:
        """Inductor's bookkeeping."""

    def precompile(self, *_: Any, **__: Any) -> None:
        """Triton compiles at the first launch."""

    def prepare_for_pickle(self) -> None:
        """Nothing is held that cannot be pickled."""
