"""The `gcu-compile` command's table of contents."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from gcu_compile.cli import bisect, demo, explain, info
from gcu_compile.cli.cache import cache
from gcu_compile.cli.calibrate import calibrate
from gcu_compile.cli.check import check
from gcu_compile.cli.cross_compile import cross_compile
from gcu_compile.cli.dump import dump
from gcu_compile.cli.quantize import quantize
from gcu_compile.cli.target import target
from gcu_compile.errors import GcuCompileError

app = typer.Typer(
    name="gcu-compile",
    help="torch.compile(backend='gcu') for vLLM models: information, models and tools.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("info")(info.info)
app.command("target")(target)
app.command("check")(check)
app.command("cross-compile")(cross_compile)
app.command("calibrate")(calibrate)
app.command("demo-model")(demo.demo_model)
app.command("explain")(explain.explain)
app.command("dump")(dump)
app.command("quantize")(quantize)
app.command("bisect")(bisect.bisect)
app.add_typer(cache, name="cache")


def main() -> None:
    """Run the command; an error of ours is one line on stderr and exit status 2."""
    try:
        app()
    except GcuCompileError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
