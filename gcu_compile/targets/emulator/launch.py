"""Launches of Triton kernels on an emulated card: refused where a card would refuse, else run in Triton's interpreter.

    check: current device -> 64-bit arguments -> grid and warps -> what the legality checker finds in the kernel's TTIR
    run:   Triton's interpreter, on the host memory that the tensors lie in
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from gcu_compile.errors import LegalityError
from gcu_compile.targets import emulator
from gcu_compile.targets.legality import Finding, Launch, Specimen, check_kernel
from gcu_compile.targets.legality.launch import check_launch
from gcu_compile.targets.legality.rules import rule
from gcu_compile.targets.triton_private import Interpreted, argument_names, constexpr_names, kernel_name

WIDE = (torch.int64, torch.uint64, torch.float64)
# Triton's names of element types.
ELEMENTS = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any
) -> None:
    """Run `kernel`, a `@triton.jit` function, over `grid` on the current emulated card.

    Args:
        args, kwargs: the kernel's arguments, constexprs among them.
        num_warps, num_stages: as on a card; the legality rules depend on them, the results do not.

    Raises:
        LegalityError: the card would refuse this launch, hang, or compute wrong numbers; names rule and remedy.
    """
    names = argument_names(kernel)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    fixed = constexpr_names(kernel)
    # Triton compiles None into the kernel as it does a constexpr.
    constants = {name: given[name] for name in names if name in given and (name in fixed or given[name] is None)}
    values = {name: value for name, value in given.items() if name in names and name not in constants}
    name = kernel_name(kernel)
    check_device(name, values)
    check_wide(name, values)
    shape = Launch(tuple(int(size) for size in grid), num_warps, num_stages)
    for broken, _, message in check_launch(shape, emulator.card().profile):
        refuse(name, rule(broken), message)
    signature = {argument: type_of(value) for argument, value in values.items()}
    finding = first_breach(kernel, tuple(signature.items()), tuple(constants.items()), num_warps, num_stages)
    if finding is not None:
        where = f" at {finding.file}:{finding.line}" if finding.line else ""
        refuse(name, rule(finding.rule), finding.message + where)
    hosts = {name: host(value) for name, value in values.items()}
    Interpreted(kernel)[shape.grid](**hosts, **constants)


def refuse(kernel: str, broken: Any, message: str) -> None:
    """Raise what `broken` says of `message`."""
    raise LegalityError(
        f"{kernel} cannot run on {emulator.card().target}: rule {broken.id}: {message}. {broken.says} "
        f"Remedy: {broken.remedy}. (Source: {broken.source})"
    )


def check_device(kernel: str, values: Mapping[str, Any]) -> None:
    """Every tensor is on the current card: pointers are per card, and a kernel with another's hangs."""
    current = torch.gcu.current_device()
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.device.type != "gcu":
            raise LegalityError(
                f"{kernel} got {name!r} on {value.device}: a card cannot reach host memory. Remedy: .to('gcu') first."
            )
        if value.device.index != current:
            raise LegalityError(
                f"{kernel} was launched while gcu:{current} is current, with {name!r} on {value.device}: on a card "
                f"this hangs. Remedy: with torch.gcu.device({value.device.index}): ... (Source: flagos-ai/Torch-FL)"
            )


def check_wide(kernel: str, values: Mapping[str, Any]) -> None:
    """No 64-bit tensors, nor integers that need 64 bits, where the card refuses them."""
    if not emulator.card().profile.value("refuses_64_bit"):
        return
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.dtype in WIDE:
            refuse(kernel, rule("no-64-bit-values"), f"argument {name!r} is a {value.dtype} tensor")
        if type_of(value) == "i64":
            refuse(kernel, rule("no-64-bit-values"), f"argument {name!r} is {value}, which needs 64 bits")


def type_of(value: Any) -> str:
    """Triton's type of an argument."""
    if isinstance(value, torch.Tensor):
        return "*" + ELEMENTS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


@lru_cache(maxsize=4096)
def first_breach(
    kernel: Any, signature: tuple, constants: tuple, num_warps: int, num_stages: int
) -> Finding | None:
    """The worst thing that the checker finds and a card would not survive; None: the kernel is legal."""
    specimen = Specimen(kernel, dict(signature), dict(constants), num_warps=num_warps, num_stages=num_stages)
    report = check_kernel(specimen, emulator.card().profile)
    fatal = [finding for finding in report.findings if finding.severity in ("abort", "error")]
    return fatal[0] if fatal else None


def host(value: Any) -> Any:
    """A tensor of the card as a CPU tensor on the same memory."""
    return torch.ops.gcu_emulator.host_view(value) if isinstance(value, torch.Tensor) else value
