"""`gcu-compile demo-model`: a real language model, without a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gcu_compile.cli.report import JsonFile, write_json

Directory = Annotated[Path | None, typer.Option("--dir", help="The model folder; default: in the user's cache.")]


def demo_model(directory: Directory = None, json_file: JsonFile = None) -> None:
    """Get SmolLM2-135M-Instruct and print its folder. Does nothing when it is already there."""
    from gcu_compile.demo_model import ensure_demo_model

    folder = ensure_demo_model(directory)
    write_json(json_file, {"model": "SmolLM2-135M-Instruct", "directory": str(folder)})
    typer.echo(folder)
