"""`gcu-compile quantize`: a checkpoint with integer weights, for vLLM and other readers of compressed-tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gcu_compile.cli.report import JsonFile, write_json

Model = Annotated[Path, typer.Argument(help="A model folder with .safetensors files and config.json.")]
Name = Annotated[str, typer.Option("--format", help="w4a16, w8a16 or w8a8.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")]
Group = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        help="Inputs per scale (w4a16, w8a16), a divisor of every layer's; default: the largest of 128, 64 and 32 that "
        "is one (w4a16), a scale per output (w8a16).",
    ),
]
Zeros = Annotated[
    bool,
    typer.Option("--asymmetric", help="A zero point beside every scale (w4a16, w8a16): nearer, a little larger."),
]
Cache = Annotated[str | None, typer.Option("--kv-cache", help="int8: ask readers for an int8 KV cache.")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="A text file, a document a line: gptq solves for it, an int8 cache gets scales from it (else: per token), "
        "and the error of the layers' outputs is measured on it.",
    ),
]
Method = Annotated[str, typer.Option("--method", help="nearest, or gptq (llmcompressor; needs --calibration).")]
Python = Annotated[
    Path | None,
    typer.Option(
        "--llmcompressor", help="The Python of an environment that has llmcompressor; default: one is made, once."
    ),
]
WORST = 5


def quantize(
    model: Model,
    name: Name,
    out: Out,
    group_size: Group = None,
    asymmetric: Zeros = False,
    kv_cache: Cache = None,
    calibration: Calibration = None,
    method: Method = "nearest",
    llmcompressor: Python = None,
    json_file: JsonFile = None,
) -> None:
    """Make integers of a model's linear layers and write a compressed-tensors checkpoint."""
    from gcu_compile import quantize as quantiser
    from gcu_compile.errors import UnknownNameError

    if kv_cache not in (None, "int8"):
        raise UnknownNameError("KV cache format", kv_cache, ("int8",))
    texts = None if calibration is None else _texts(calibration)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("layers", total=None)

        def progress(layer: str, done: int, total: int) -> None:
            bar.update(task, description=layer, completed=done, total=total)

        cached = kv_cache is not None
        how = method, llmcompressor, asymmetric
        result = quantiser.quantize(model, out, name, group_size, progress, cached, texts, *how)
    write_json(json_file, result)
    layers = result["layers"]
    size = f"groups of {result['group_size']}" if result["group_size"] else "a scale per output"
    size += " with zero points" if result["asymmetric"] else ""
    cache = {"static": ", int8 KV cache with calibrated scales", "dynamic": ", int8 KV cache", None: ""}
    typer.echo(f"{out}: {name}, {method}, {size}, {len(layers)} layers{cache[result['kv_cache']]}")
    typer.echo(f"{result['bytes_before'] / 1e6:.1f} MB -> {result['bytes_after'] / 1e6:.1f} MB")
    _errors("error of the weights, |difference| / |weight|", "relative", layers)
    _errors("error of the outputs on the calibration's texts", "outputs", layers)
    _warn(result["left"])


def _texts(file: Path) -> list[str]:
    from gcu_compile.errors import InvalidValueError

    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidValueError("--calibration", str(file), f"a text file, a document a line ({why})") from error


def _warn(left: list[dict]) -> None:
    """Weights that stay float though their kind is otherwise quantised: one line for those that differ by numbers."""
    alike: dict[tuple[str, str], int] = {}
    for weight in left:
        if not weight["meant"]:
            key = re.sub(r"(?<=\.)\d+(?=\.)", "*", weight["name"]), weight["reason"]
            alike[key] = alike.get(key, 0) + 1
    for (name, reason), count in alike.items():
        typer.echo(f"warning: {name} stays float ({count} in all), and readers are told so: {reason}", err=True)


def _errors(title: str, key: str, layers: list[dict]) -> None:
    """The mean error and the largest ones, of the layers where it was measured."""
    layers = sorted((layer for layer in layers if layer[key] is not None), key=lambda layer: -layer[key])
    if not layers:
        return
    typer.echo(f"{title}: mean {sum(layer[key] for layer in layers) / len(layers):.4f}; largest:")
    for layer in layers[:WORST]:
        typer.echo(f"  {layer[key]:.4f}  {layer['name']}")
