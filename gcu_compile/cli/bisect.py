"""`gcu-compile bisect`: which match, or Inductor itself, makes a result wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gcu_compile.cli.explain import Length, Settings, Subject, Through, checked, engine, load, model_folder, parse
from gcu_compile.cli.report import JsonFile, write_json

Script = Annotated[Path | None, typer.Option(help="Write a stand-alone reproduction here.")]


ENGINE_CASE = """
def case():
    return {folder!r}, ({length},)
"""


def bisect(
    subject: Subject,
    prompt_length: Length = 16,
    through: Through = "transformers",
    set_: Settings = None,
    script: Script = None,
    json_file: JsonFile = None,
) -> None:
    """Search by halves; exit status 1 if something is wrong, 0 if compiled and eager agree."""
    from gcu_compile.debug import bisect as tool

    options, folder = parse(set_ or []), str(Path(subject).resolve())
    if checked(through) == "vllm":
        module, function = "vllm_integration.bisect", "case"
        case = ENGINE_CASE.format(folder=folder, length=prompt_length)
        found = engine("bisect").bisect(model_folder(subject), prompt_length, options)
    else:
        file, _, function = subject.rpartition(":")
        module, is_file = tool.__name__, file.endswith(".py")
        case = Path(file).read_text() if is_file else tool.MODEL_CASE.format(folder=folder, length=prompt_length)
        function = function if is_file else "case"
        fn, args = load(subject, prompt_length)
        found = tool.bisect(fn, *args, options=options)
    write_json(json_file, found.to_json())
    if script is not None:
        script.write_text(tool.script(found, case, function, module))
    typer.echo(found)
    sys.exit(found.kind != "nothing")
