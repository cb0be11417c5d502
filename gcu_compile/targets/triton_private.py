"""Every touch of Triton's inner API, without a device: a kernel's TTIR, its CUDA binary, its run in the interpreter.

Works on Triton 3.6 to 3.9.
"""

from __future__ import annotations

import ast
import contextlib
import os
import textwrap
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
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


def argument_names(kernel: Any) -> tuple[str, ...]:
    """Names of all arguments of a `@triton.jit` function, in order."""
    return tuple(_jit_function(kernel).arg_names)


def constexpr_names(kernel: Any) -> tuple[str, ...]:
    """Names of the constexpr arguments of a `@triton.jit` function."""
    return tuple(parameter.name for parameter in _jit_function(kernel).params if parameter.is_constexpr)


def kernel_source(kernel: Any) -> str:
    """The text of a `@triton.jit` function."""
    return _jit_function(kernel).src


def kernel_place(kernel: Any) -> tuple[str, str]:
    """File and name of a `@triton.jit` function: the same for one that was imported twice under two names."""
    function = _jit_function(kernel).fn
    return os.path.realpath(function.__code__.co_filename), function.__name__


def kernels_called(kernel: Any) -> list[Any]:
    """The `@triton.jit` functions that a kernel's code names: imported ones, and those of imported modules."""
    around = _jit_function(kernel).fn.__globals__
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(kernel_source(kernel)))):
        if isinstance(node, ast.Name):
            found.append(around.get(node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append(getattr(around.get(node.value.id), node.attr, None))
    return [value for value in found if is_kernel(value)]


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


def compile_for_cuda(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    *,
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Compile a `@triton.jit` kernel ahead of time for an NVIDIA GPU; no GPU is needed.

    Args:
        kernel, signature, constexprs: as in `compile_ttir`.
        capability: compute capability, e.g. 90 for sm_90.
        num_warps, num_stages, options: of Triton's CUDA backend.

    Returns:
        What Triton made by stage: at least "ttir", "ttgir", "ptx" (text) and "cubin" (bytes).

    Raises:
        KernelBuildError: Triton or its assembler refuses the kernel, or Triton is missing.
        UnknownNameError, InvalidInputError: the signature does not fit the kernel.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, CompilationError
    except ImportError as error:
        raise KernelBuildError(f"compiling a kernel needs Triton 3.6 or newer: {error}") from error
    function = _jit_function(kernel)
    if function is None:
        raise InvalidInputError(f"{kernel!r} is not a @triton.jit function")
    constants = dict(constexprs or {})
    kinds = _argument_types(function, signature, constants)
    source = ASTSource(fn=function, signature=kinds, constexprs=constants)
    given = {"num_warps": num_warps, "num_stages": num_stages, **options}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)
    except (CompilationError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise KernelBuildError(f"Triton cannot compile {function.__name__} for sm_{capability}: {error}") from error
    return dict(compiled.asm)


_interpreting = threading.RLock()


class Interpreted:
    """A kernel that runs in Triton's interpreter: `Interpreted(kernel)[grid](*arguments, **constexprs)`.

    Triton decides at decoration time whether a function is interpreted. This wraps one that is not, in the same
    process: the functions that it calls, Triton's own and those of other modules, come along, and what was patched
    is restored after each launch, so that the same kernel can still be compiled.

    Tensors may be on any device whose storages copy to the CPU and back. Launch options (`num_warps`, `num_stages`,
    `enable_fp_fusion`, ...) are accepted and have no meaning here.
    """

    def __init__(self, kernel: Any):
        self.function = _jit_function(kernel)
        if self.function is None:
            raise InvalidInputError(f"{kernel!r} is not a @triton.jit function")

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """The launcher of one grid: a tuple of up to three sizes, or a function of the arguments that gives it."""

        def launch(*args: Any, **kwargs: Any) -> None:
            from triton.runtime.interpreter import InterpretedFunction

            with _interpreter_scope():
                InterpretedFunction(self.function.fn).run(*args, grid=grid, warmup=False, **kwargs)

        return launch


def _to_bfloat16(values: Any) -> Any:
    """The bits, in uint16, of float32 values rounded to bfloat16, ties to even."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@contextlib.contextmanager
def _interpreter_scope() -> Iterator[None]:
    """Triton's language as the interpreter wants it, for one launch."""
    import numpy as np
    import triton.language as tl
    from triton import knobs
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        # A call of another @triton.jit function inside a kernel. InterpretedFunction.__call__ would patch the
        # language once more and never restore it.
        kwargs.pop("_semantic", None)
        return interpreter.InterpretedFunction(function.fn).rewrite()(*args, **kwargs)

    def dot(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        # numpy has no bfloat16: the interpreter holds its bits in uint16 and would multiply those.
        return original_dot(builder, _widened(a), _widened(b), d, *rest)

    def _widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def cast(builder: Any, src: Any, dst_type: Any) -> Any:
        # For the same reason an integer becomes bfloat16, and back, by way of float32.
        ends = (src.dtype.scalar, dst_type.scalar)
        if tl.bfloat16 in ends and tl.float32 not in ends:
            return cast(builder, original_cast(builder, src, tl.float32), dst_type)
        if ends == (tl.float32, tl.bfloat16):  # the interpreter's own conversion truncates
            return interpreter.TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        return original_cast(builder, src, dst_type)

    everywhere = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    builder = interpreter.InterpreterBuilder
    original_call, original_dot, original_cast = JITFunction.__call__, builder.create_dot, builder.cast_impl
    with _interpreting, np.errstate(all="ignore"), knobs.runtime.scope():
        knobs.runtime.interpret = True
        scope = interpreter._patch_lang(everywhere)
        JITFunction.__call__, builder.create_dot, builder.cast_impl = call, dot, cast
        try:
            yield
        finally:
            JITFunction.__call__, builder.create_dot, builder.cast_impl = original_call, original_dot, original_cast
            scope.restore()
