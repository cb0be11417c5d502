"""Layers point down: kernels know nothing of lowering, lowering nothing of vLLM."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# package -> what it must not import.
FORBIDDEN = {
    "gcu_compile": ("vllm", "vllm_integration", "torch_gcu"),
    "gcu_compile/kernels": ("gcu_compile.lowering", "gcu_compile.backend", "gcu_compile.debug", "gcu_compile.cli"),
    "gcu_compile/targets": (
        "gcu_compile.lowering",
        "gcu_compile.kernels",
        "gcu_compile.backend",
        "gcu_compile.debug",
        "gcu_compile.cli",
    ),
    "gcu_compile/codegen": ("gcu_compile.lowering", "gcu_compile.backend", "gcu_compile.debug", "gcu_compile.cli"),
    "gcu_compile/replay": ("gcu_compile.lowering", "gcu_compile.backend", "gcu_compile.debug", "gcu_compile.cli"),
    "gcu_compile/lowering": ("gcu_compile.backend", "gcu_compile.debug", "gcu_compile.cli"),
}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def breaches(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    return [n for n in imports_of(path) if any(n == f or n.startswith(f + ".") for f in forbidden)]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_down(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(p.relative_to(ROOT)): b for p in files if (b := breaches(p, FORBIDDEN[package]))}
    assert not found


def test_a_breach_is_seen(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from vllm.config import VllmConfig\n")
    assert breaches(bad, ("vllm",))


def test_private_torch_is_touched_in_private_modules_only():
    # torch_private.py: compiling. codegen/*_private.py: a device's registration and Inductor subclass.
    # cache/*_private.py: the files of Inductor's cache. replay/*_private.py: the kernels of its wrappers.
    folders = ("codegen", "cache", "replay")
    modules = {f"{folder}/{file.name}" for folder in folders for file in (ROOT / "gcu_compile" / folder).iterdir()}
    allowed = {"torch_private.py", *(name for name in modules if name.endswith("_private.py"))}
    private = ("torch._inductor", "torch._functorch", "torch._dynamo")
    package = ROOT / "gcu_compile"
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if breaches(p, private)}
    assert found <= allowed


def test_importing_us_imports_neither_vllm_nor_torch():
    code = "import sys, gcu_compile, vllm_integration; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr


def test_files_can_be_read_in_one_sitting():
    files = [p for d in ("gcu_compile", "vllm_integration", "tests", "examples") for p in (ROOT / d).rglob("*.py")]
    native = [p for kind in ("*.cpp", "*.h") for p in (ROOT / "gcu_compile").rglob(kind)]
    assert native
    files += native
    long = {str(p.relative_to(ROOT)) for p in files if len(p.read_text().splitlines()) > 400}
    assert not long


def test_test_files_have_names_of_their_own():
    """pytest imports a file by its name alone: two of one name cannot be collected together."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "__init__.py")
    assert not [name for name, count in names.items() if count > 1 and name != "conftest.py"]
