"""Every touch of Triton's inner API: a kernel's TTIR without a device. Works on Triton 3.6 to 3.9."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from gcu_compile.errors import InvalidInputError, KernelBuildError, UnknownNameError

# Target-independent passes only: the CUDA pipeline would turn block pointers into 64-bit address arithmetic.
PASSES = (
    ("common", "add_inliner"),
    ("common", "add_canonicalizer"),
    ("ttir", "add_combine"),
    ("ttir", "add_reorder_broadcast"),
    ("common", "add_cse"),
    ("common", "add_symbol_dce"),
    ("ttir", "add_loop_unroll"),
)
# Whose dialects and built-in functions are borrowed; no CUDA pass is run.
FRONT_END = ("cuda", 90, 32)


def is_kernel(value: Any) -> bool:
    """Whether `value` is a `@triton.jit` function (autotuned or not)."""
    return _jit_function(value) is not None


def kernel_name(kernel: Any) -> str:
    """The name of a `@triton.jit` function."""
    return getattr(_jit_function(kernel), "__name__", repr(kernel))


def kernel_source(kernel: Any) -> str:
    """The text of a `@triton.jit` function."""
    return _jit_function(kernel).src


def _jit_function(value: Any) -> Any:
    """The function under `triton.jit`, `autotune` and `heuristics`; None for anything else."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return None
    seen = 0
    while not isinstance(value, JITFunction) and hasattr(value, "fn") and seen < 8:
        value, seen = value.fn, seen + 1
    return value if isinstance(value, JITFunction) else None


def compile_ttir(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    dot_precision: str = "ieee",
) -> str:
    """TTIR text, with source locations, of a `@triton.jit` kernel.

    Args:
        kernel: the decorated function.
        signature: argument name to Triton type ("*fp16", "i32", "fp32", "constexpr"); those in `constexprs` may
            be left out.
        constexprs: values of the constexpr arguments.
        num_warps: warps per program.
        num_stages: pipeline stages of its loops.
        dot_precision: input precision of an f32 `tl.dot` that names none.

    Raises:
        KernelBuildError: Triton is not installed, or refuses the kernel.
        UnknownNameError: an argument that the kernel does not have.
        InvalidInputError: an argument without a type, or `kernel` is not a Triton function.
    """
    try:
        from triton import knobs
        from triton._C.libtriton import ir, passes
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, CompilationError, make_backend
    except ImportError as error:
        raise KernelBuildError(f"compiling a kernel needs Triton 3.6 or newer: {error}") from error
    function = _jit_function(kernel)
    if function is None:
        raise InvalidInputError(f"{kernel!r} is not a @triton.jit function")
    constants = dict(constexprs or {})
    types = _argument_types(function, signature, constants)
    target = GPUTarget(*FRONT_END)
    with warnings.catch_warnings(), knobs.compilation.scope():
        warnings.simplefilter("ignore")
        # Findings name source lines, whatever the user's environment says.
        knobs.compilation.disable_line_info = False
        backend = make_backend(target)
        given = {"num_warps": num_warps, "num_stages": num_stages, "default_dot_input_precision": dot_precision}
        options = backend.parse_options(given)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(fn=function, signature=types, constexprs=constants)
        helpers = backend.get_codegen_implementation(options)
        try:
            module = source.make_ir(target, options, helpers, backend.get_module_map(), context)
            manager = ir.pass_manager(context)
            for group, name in PASSES:
                getattr(getattr(passes, group), name)(manager)
            manager.run(module, "make_ttir")
        except (CompilationError, RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise KernelBuildError(f"Triton refuses {function.__name__}: {error}") from error
        return str(module)


def _argument_types(function: Any, signature: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, str]:
    """The signature in the kernel's own order, constexprs included; complains of what is missing or unknown."""
    types = dict(signature) | dict.fromkeys(constants, "constexpr")
    for name in types:
        if name not in function.arg_names:
            raise UnknownNameError(f"argument of {function.__name__}", name, function.arg_names)
    for name in function.arg_names:
        if name not in types or (types[name] == "constexpr" and name not in constants):
            lacks = "value" if types.get(name) == "constexpr" else "type"
            raise InvalidInputError(f"argument {name!r} of {function.__name__} has no {lacks} in its specimen")
    return {name: types[name] for name in function.arg_names}
