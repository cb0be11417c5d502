"""What every command shares: a JSON report beside the table, and errors as one line."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file, as JSON.")]


def write_json(file: Path | None, report: dict[str, Any]) -> None:
    """Write `report` to `file`, aside and then renamed, so that no reader sees half of it. None: do nothing.

    Raises:
        typer.BadParameter: the file cannot be written.
    """
    if file is None:
        return
    try:
        handle, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(handle, "w") as stream:
            json.dump(report, stream, indent=2, default=str)
            stream.write("\n")
        os.chmod(aside, 0o644)
        os.replace(aside, file)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {file}: {error}") from error
