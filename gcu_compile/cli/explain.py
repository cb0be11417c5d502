"""`gcu-compile explain`: what became of a model or a function."""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from gcu_compile.cli.report import JsonFile, write_json
from gcu_compile.errors import CheckpointError, InvalidValueError, TargetUnavailableError, UnknownNameError

THROUGH = ("transformers", "vllm")
Subject = Annotated[str, typer.Argument(help="A Hugging Face folder, or FILE.py:FUNCTION that returns (fn, args).")]
Length = Annotated[int, typer.Option(help="Tokens of the prompt, for a model.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="option=value, repeatable.")]


Through = Annotated[str, typer.Option(help=f"How a model folder is run: {', '.join(THROUGH)}.")]


def explain(
    subject: Subject,
    prompt_length: Length = 16,
    through: Through = "transformers",
    set_: Settings = None,
    json_file: JsonFile = None,
) -> None:
    """Compile and run once; print every place where a rule looked, graph breaks, fallbacks and kernels."""
    from gcu_compile.debug.explain import explain as run

    options = parse(set_ or [])
    if checked(through) == "vllm":
        report = engine("explain").explain(model_folder(subject), prompt_length, options)
    else:
        fn, args = load(subject, prompt_length)
        report = run(fn, *args, options=options)
    write_json(json_file, report.to_json())
    Console().print(report)


def checked(through: str) -> str:
    """`through`, if it is a way of running a model.

    Raises:
        UnknownNameError: it is not.
    """
    if through not in THROUGH:
        raise UnknownNameError("way of running a model", through, THROUGH, "--through")
    return through


def engine(tool: str) -> ModuleType:
    """vLLM's side of a command. It lives in the package that may import vLLM, and is looked up here only.

    Raises:
        TargetUnavailableError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise TargetUnavailableError("--through vllm needs vLLM, which is not installed here")
    return importlib.import_module(f"vllm_integration.{tool}")


def model_folder(subject: str) -> str:
    """`subject`, if it is a model folder.

    Raises:
        CheckpointError: it has no config.json.
    """
    if not (Path(subject) / "config.json").is_file():
        raise CheckpointError(f"{subject} is not a model folder: it has no config.json")
    return subject


def parse(settings: list[str]) -> dict[str, str]:
    """`["cache=0"]` -> `{"cache": "0"}`."""
    for setting in settings:
        if "=" not in setting:
            raise InvalidValueError("--set", setting, "option=value")
    return dict(setting.split("=", 1) for setting in settings)


def load(subject: str, prompt_length: int) -> tuple[Callable, tuple[Any, ...]]:
    """The function to compile and its arguments.

    Raises:
        CheckpointError: no such folder or file, a folder without config.json, a file without that function.
    """
    file, _, name = subject.rpartition(":")
    if file.endswith(".py"):
        if not Path(file).is_file():
            raise CheckpointError(f"{file} does not exist")
        functions = runpy.run_path(file)
        if not callable(functions.get(name)):
            raise CheckpointError(f"{file} has no function {name!r} that returns (fn, args)")
        return functions[name]()
    model_folder(subject)
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(subject, dtype=torch.float32).eval()
    ids = torch.arange(prompt_length).remainder(model.config.vocab_size).unsqueeze(0)

    def forward(tokens):
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    return forward, (ids,)
