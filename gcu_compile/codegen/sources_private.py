"""What a generated wrapper holds: its Triton kernels with their launches, and its calls in order."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import tempfile
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch._inductor.runtime.triton_heuristics import GridExpr

from gcu_compile.codegen.launch import Launcher

DEFINITION = re.compile(r"^(\w+) = async_compile\.triton\('(\w+)', '''\n(.*?)''', device_str='\w+'\)", re.M | re.S)
DRIVER = "triton_helpers.set_driver_to_gpu()\n"


@dataclass
class GeneratedKernel:
    """One Triton kernel as Inductor wrote it.

    signature: argument name to Triton type. constexprs: block sizes. grid: programs in x, y, z for `numels`, the sizes
    that the wrapper passes.
    """

    name: str
    source: str
    function: Any = field(repr=False, default=None)
    signature: dict[str, str] = field(default_factory=dict)
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    grid: tuple[int, ...] = (1,)
    values: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The kernel alone, without imports and Inductor's metadata."""
        return self.source[self.source.index("@triton.jit") :].strip()


@dataclass(frozen=True)
class Call:
    """One line of the wrapper that does work. kind: `triton` or `extern`. target: kernel, or torch's operation."""

    kind: str
    target: str
    arguments: tuple[str, ...]
    result: str = ""


def kernels_of(wrapper: str) -> dict[str, GeneratedKernel]:
    """The kernels that a wrapper defines, by name."""
    calls = {call.target: call for call in calls_of(wrapper) if call.kind == "triton"}
    return {name: load(name, source, calls.get(name)) for name, _, source in DEFINITION.findall(wrapper)}


def calls_of(wrapper: str) -> list[Call]:
    """Kernel launches and operation calls of the wrapper's `call`, in order."""
    tree = ast.parse(wrapper)
    bodies = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "call"]
    found: list[Call] = []
    for node in ast.walk(bodies[0]) if bodies else ():
        value = getattr(node, "value", None)
        if not isinstance(node, (ast.Expr, ast.Assign)) or not isinstance(value, ast.Call):
            continue
        target = ast.unparse(value.func)
        arguments = tuple(ast.unparse(a) for a in [*value.args, *value.keywords])
        result = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if target.endswith(".run"):
            found.append(Call("triton", target[: -len(".run")], arguments, result))
        elif target.startswith(("extern_kernels.", "torch.ops.", "aten.")):
            found.append(Call("extern", target.replace("torch.ops.", ""), arguments, result))
    return found


def load(name: str, source: str, call: Call | None = None) -> GeneratedKernel:
    """A kernel's function and launch.

    Args:
        call: how the wrapper launches it: gives the grid of a kernel whose grid depends on its sizes.
    """
    kernel = GeneratedKernel(name, source)
    module = _execute(name, source)
    tuned = module.__dict__.get(name) or module.__dict__["triton_"]
    kernel.function = tuned.fn
    arguments = tuned.fn.arg_names
    kernel.signature = dict(tuned.triton_meta["signature"])
    if isinstance(tuned, Launcher):
        kernel.constexprs, kernel.grid = tuned.constexprs | dict(tuned.triton_meta["constants"]), tuned.grid
        kernel.num_warps, kernel.num_stages = tuned.config["num_warps"], tuned.config["num_stages"]
        kernel.values = _numbers(arguments, tuned.constexprs, call)
        return kernel
    # Inductor's own: of the configurations that it would time on a device, the first.
    chosen = tuned.configs[0]
    kernel.constexprs = {n: v for n, v in chosen.kwargs.items() if n in arguments}
    kernel.constexprs |= {n: v for n, v in tuned.triton_meta.get("constants", {}).items() if n in arguments}
    kernel.num_warps, kernel.num_stages = chosen.num_warps, chosen.num_stages
    kernel.values = _numbers(arguments, chosen.kwargs, call)
    if call is not None:
        kernel.grid = GridExpr.from_meta(tuned.inductor_meta, chosen).eval_slow({**kernel.values, **kernel.constexprs})
    return kernel


def _numbers(arguments: list[str], constexprs: dict[str, Any], call: Call | None) -> dict[str, int]:
    """The integers among the arguments of a launch, by name."""
    passed = [a for a in call.arguments if not a.startswith("stream=")] if call else []
    plain = [name for name in arguments if name not in constexprs]
    return {name: int(text) for name, text in zip(plain, passed, strict=False) if re.fullmatch(r"-?\d+", text)}


def _execute(name: str, source: str) -> types.ModuleType:
    """Run a kernel's file: Triton reads a function's source from disk."""
    text = source.replace(DRIVER, "")
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"gcu_compile_kernels_{digest[:2]}"
    folder.mkdir(exist_ok=True)
    file = folder / f"k{digest}.py"
    if not file.exists() or file.read_text() != text:
        aside = file.with_suffix(f".{id(text)}")
        aside.write_text(text)
        aside.replace(file)
    module = types.ModuleType(f"gcu_generated_{digest}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    exec(compile(text, str(file), "exec"), module.__dict__)
    return module
