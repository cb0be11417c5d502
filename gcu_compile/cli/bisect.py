"""`gcu-compile bisect`: which match, or Inductor itself, makes a result wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gcu_compile.cli.explain import Length, Settings, Subject, load, parse
from gcu_compile.cli.report import JsonFile, write_json

Script = Annotated[Path | None, typer.Option(help="Write a stand-alone reproduction here.")]


def bisect(
    subject: Subject,
    prompt_length: Length = 16,
    set_: Settings = None,
    script: Script = None,
    json_file: JsonFile = None,
) -> None:
    """Search by halves; exit status 1 if something is wrong, 0 if compiled and eager agree."""
    from gcu_compile.debug import bisect as tool

    file, _, function = subject.rpartition(":")
    fn, args = load(subject, prompt_length)
    found = tool.bisect(fn, *args, options=parse(set_ or []))
    write_json(json_file, found.to_json())
    if script is not None:
        is_file = file.endswith(".py")
        folder = str(Path(subject).resolve())
        case = Path(file).read_text() if is_file else tool.MODEL_CASE.format(folder=folder, length=prompt_length)
        script.write_text(tool.script(found, case, function if is_file else "case"))
    typer.echo(found)
    sys.exit(found.kind != "nothing")
