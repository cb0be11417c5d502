"""Tile sizes, warps and stages of each kernel on each target, as data: `configs.yaml`.

>>> configs("sample", "gcu300")[0].tile["BLOCK"]
8192
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr

from gcu_compile.errors import UnknownNameError


class Config(BaseModel):
    """One way to launch a kernel. tile: its constexpr block sizes. source: where the numbers come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tile: dict[StrictStr, StrictInt]
    num_warps: StrictInt
    num_stages: StrictInt
    source: StrictStr


def configs(kernel: str, target: str) -> tuple[Config, ...]:
    """The configurations of a kernel on `cuda`, `gcu300` or `gcu400`, best known first.

    Raises:
        UnknownNameError: no such kernel or target.
    """
    table = _table()
    if kernel not in table:
        raise UnknownNameError("Triton kernel", kernel, table)
    if target not in table[kernel]:
        raise UnknownNameError("target", target, table[kernel])
    return table[kernel][target]


@lru_cache
def _table() -> dict[str, dict[str, tuple[Config, ...]]]:
    given = yaml.safe_load((Path(__file__).parent / "configs.yaml").read_text())
    return {
        kernel: {target: tuple(Config(**entry) for entry in entries) for target, entries in targets.items()}
        for kernel, targets in given.items()
    }
