"""Rates of the device that is here, measured: what the profile's cost model otherwise takes from publications.

Four facts can be measured through torch alone, on any device: the cost of a launch, memory bandwidth, products per
second and elementwise operations per second. The result is a profile override: `GCU_COMPILE_TARGET_PROFILE=FILE`.
The costs of DMA slices (`dma_setup_cost`, `dma_row_cost`, `gather_element_cost`) are not measured here.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

from gcu_compile.errors import InvalidValueError, TargetUnavailableError

DOT_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
REPEATS = 7


def calibrate(device: str = "", megabytes: int = 256, size: int = 2048, repeats: int = REPEATS) -> dict[str, Any]:
    """Measure the device.

    Args:
        device: torch's name of it; "": a card if one is here, else the CPU.
        megabytes: size of the vectors that are copied; they must not fit a cache.
        size: edge of the matrices that are multiplied.
        repeats: of each measurement, the median of which counts.

    Returns: fact -> {value, source, confidence}, as a profile override has them.

    Raises:
        TargetUnavailableError: no such device here.
        InvalidValueError: a size or a number of repeats below 1.
    """
    for what, number in (("megabytes", megabytes), ("size", size), ("repeats", repeats)):
        if number < 1:
            raise InvalidValueError(what, number, "a positive number")
    name = device or default_device()
    clock = _Clock(name, repeats)
    source = f"calibrate on {describe(name)}, {date.today()}, torch {torch.__version__}, median of {repeats}"
    launch = clock.launch()
    bandwidth = clock.bandwidth(megabytes << 20, launch)
    dots = {kind: round(clock.dot(dtype, size, launch), 3) for kind, dtype in DOT_TYPES.items()}
    vector = clock.vector(size * size, launch)
    return {
        "launch_cost": _fact(round(launch, 3), f"{source}: an addition of one element"),
        "dram_bandwidth": _fact(round(bandwidth, 2), f"{source}: a copy of {megabytes} MiB"),
        "dot_rate": _fact({**dots, "i8": dots["bf16"]}, f"{source}: products of {size} x {size}; i8 set equal to bf16"),
        "vector_rate": _fact(round(vector, 3), f"{source}: multiplication in place of {size * size} f32 in a cache"),
    }


def default_device() -> str:
    """A card if torch sees one, else the CPU."""
    for name in ("gcu", "cuda"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return name
    return "cpu"


def describe(name: str) -> str:
    """The device by the name that its maker gave it."""
    module = getattr(torch, name, None)
    if name != "cpu" and hasattr(module, "get_device_name"):
        return str(module.get_device_name())
    if name == "cpu" and Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return platform.processor() or name


def write(facts: dict[str, Any], file: Path) -> None:
    """The override file, written aside and then renamed."""
    handle, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(handle, "w") as stream:
        stream.write("# Measured on this machine; use it with GCU_COMPILE_TARGET_PROFILE or --profile.\n")
        yaml.safe_dump(facts, stream, sort_keys=False)
    os.replace(aside, file)


def _fact(value: Any, source: str) -> dict[str, Any]:
    return {"value": value, "source": source, "confidence": "measured"}


class _Clock:
    """Medians of timed calls on one device. Times in microseconds."""

    def __init__(self, device: str, repeats: int):
        try:
            torch.empty(1, device=device).add_(1)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise TargetUnavailableError(
                f"no device {device!r} to measure: {str(error).splitlines()[0]}. Name another one, or none."
            ) from error
        self.device, self.repeats = device, repeats

    def synchronize(self) -> None:
        if self.device != "cpu":
            getattr(torch, self.device.split(":")[0]).synchronize()

    def median(self, call: Callable[[], Any], times: int) -> float:
        """Microseconds of one of `times` calls in a row."""
        call()
        found = []
        for _ in range(self.repeats):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                call()
            self.synchronize()
            found.append((time.perf_counter() - start) / times * 1e6)
        return statistics.median(found)

    def launch(self) -> float:
        x = torch.ones(1, device=self.device)
        return self.median(lambda: x.add_(1.0), 200)

    def bandwidth(self, size: int, launch: float) -> float:
        """GB/s of reads and writes together."""
        x = torch.ones(size // 4, device=self.device)
        y = torch.empty_like(x)
        return 2 * size / max(self.median(lambda: y.copy_(x), 3) - launch, 1e-3) / 1e3

    def dot(self, dtype: torch.dtype, size: int, launch: float) -> float:
        """Tera operations per second, multiplications and additions."""
        x = torch.ones(size, size, device=self.device, dtype=dtype)
        y = torch.empty_like(x)
        return 2 * size**3 / max(self.median(lambda: torch.mm(x, x, out=y), 1) - launch, 1e-3) / 1e6

    def vector(self, count: int, launch: float) -> float:
        """Giga f32 operations per second, on what fits a cache: so that memory is not what is measured."""
        count = min(count, 1 << 18)
        x = torch.ones(count, device=self.device)
        return count / max(self.median(lambda: x.mul_(1.0000001), 50) - launch, 1e-3) / 1e3
