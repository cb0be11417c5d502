"""`gcu-compile calibrate`: measure the device that is here, for the cost model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gcu_compile.cli.report import JsonFile, write_json
from gcu_compile.cli.target import written
from gcu_compile.targets import calibrate as measuring


def calibrate(
    out: Annotated[Path, typer.Argument(help="The YAML file to write: a profile override.", metavar="FILE")],
    device: Annotated[str, typer.Option("--device", help="torch's name; default: a card if here, else cpu.")] = "",
    megabytes: Annotated[int, typer.Option("--megabytes", help="Size of the copied vectors.")] = 256,
    size: Annotated[int, typer.Option("--size", help="Edge of the multiplied matrices.")] = 2048,
    repeats: Annotated[int, typer.Option("--repeats", help="Of each measurement; the median counts.")] = 7,
    json_file: JsonFile = None,
) -> None:
    """Measure launch cost, bandwidth, products and elementwise operations per second, and write them as an override.

    Use the file with GCU_COMPILE_TARGET_PROFILE=FILE, or --profile FILE of `check`, `target` and `cross-compile`.
    """
    facts = measuring.calibrate(device, megabytes, size, repeats)
    measuring.write(facts, out)
    write_json(json_file, {"device": device or measuring.default_device(), "facts": facts})
    table = Table("fact", "value", "source", title=f"Measured, written to {out}", title_justify="left")
    for name, fact in facts.items():
        table.add_row(name, written(fact["value"]), escape(fact["source"]))
    Console().print(table)
