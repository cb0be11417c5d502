"""How Inductor's Python wrapper calls our operations on the CPU: past torch's dispatcher, where its version lets us.

    buf0 = torch.ops.gcu.int8_gemm.default(arg0_1, ...)    becomes    buf0 = gcu_direct.int8_gemm(arg0_1, ...)

with optional arguments by name, and without those that have their default.

Without (torch 2.11 has no place for it) the wrapper calls the operation, which means the same and takes longer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.virtualized import V

from gcu_compile.kernels import registry

IMPORT = "from gcu_compile.kernels import direct as gcu_direct"
LEFT_OUT = ("=None", "site=''")  # how an argument that has its default ends; all that are optional have that


def install() -> None:
    """Tell Inductor how to write calls of the operations that are registered so far. Idempotent."""
    try:
        from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    except ImportError:
        return
    for op in registry.OPS.values():
        if registry.has_direct(op):
            name = f"torch.ops.gcu.{op.name}.default"
            CUSTOM_EXTERN_KERNEL_CODEGEN[name] = CustomCodegen(python=functools.partial(_write, op.name, name))


def _write(op: str, name: str, node: Any, writeline: Callable[[str], None]) -> None:
    """The line of one call."""
    overload = getattr(torch.ops.gcu, op).default
    given = zip(overload._schema.arguments, node.codegen_args(), strict=False)
    texts = [f"{taken.name}={text}" if taken.has_default_value() else text for taken, text in given]
    arguments = [text for text in (*texts, *node.codegen_kwargs()) if not text.endswith(LEFT_OUT)]
    if all(tensor.get_device().type == "cpu" for tensor in node.inputs):
        V.graph.wrapper_code.add_import_once(IMPORT)
        name = f"gcu_direct.{op}"
    writeline(f"{node.get_name()} = {name}({', '.join(arguments)})")
