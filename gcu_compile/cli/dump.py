"""`gcu-compile dump`: everything that a compilation did, as a folder and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gcu_compile.cli.explain import Length, Settings, Subject, load, parse
from gcu_compile.cli.report import JsonFile, write_json
from gcu_compile.errors import InvalidValueError

Directory = Annotated[Path, typer.Option("--dir", help="Where to write; an older dump there is replaced.")]


def dump(
    subject: Subject,
    directory: Directory,
    prompt_length: Length = 16,
    set_: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """Compile and run once, and write what became of it; open index.html in any browser."""
    from gcu_compile.debug import dump as tool
    from gcu_compile.debug import page

    if directory.exists() and not directory.is_dir():
        raise InvalidValueError("--dir", str(directory), "a folder")
    tool.clear(directory)
    fn, args = load(subject, prompt_length)
    tool.dump(fn, *args, directory=directory, options=parse(set_ or []))
    write_json(json_file, page.data(directory))
    typer.echo(directory / "index.html")
