"""How a fused operation is defined, and how a call of it finds its implementation.

A `FusedOp` holds one meaning: schema, eager meaning in plain torch, fake, tolerance. An
`Implementation` is a faster way to compute the same for one kind of device. `register` makes
`torch.ops.gcu.<name>` of it:

    call -> first implementation for the tensors' device whose `refuses(...)` gives no reason -> run
         -> none: the eager meaning, counted in `fallbacks` with every reason, and warned of once

On the CPU an implementation's `direct` is asked before all that: it knows arguments that were looked at before.

Every operation takes one more keyword, `site`: where it stands in a compiled graph. It is empty unless the
graph was compiled with the shadow check on, changes no result, and no implementation sees it.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gcu_compile.errors import KernelBuildError, UnknownNameError
from gcu_compile.kernels.modes_private import watched

log = logging.getLogger(__name__)
LIBRARY = torch.library.Library("gcu", "FRAGMENT")
# Operations that call fused operations and have no meaning, site or tolerance of their own.
COMPOSITE = torch.library.Library("gcu_composite", "FRAGMENT")

OPS: dict[str, FusedOp] = {}
# (operation, reason) -> calls that ran the eager meaning instead of a kernel.
fallbacks: Counter[tuple[str, str]] = Counter()
# (operation, implementation) -> calls.
calls: Counter[tuple[str, str]] = Counter()
# Called as `watcher(op, implementation, run, site, args, kwargs)` instead of `run(*args, **kwargs)`; what it
# returns is the result. None, and not looked at again, unless the shadow check is on.
watcher: Callable | None = None


def _never(*args, **kwargs) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute a fused operation.

    Attributes:
        name: `host_cpp`, `triton` or `library`; unique within the operation.
        devices: torch device types that it serves, e.g. `("cpu",)`.
        run: called with the operation's arguments; returns its result.
        refuses: called with the same arguments; the reason why it cannot take them, or None.
        direct: of one that serves the CPU: called first, with the same arguments. The result, or None for all that it
            would have to look at more closely. It raises `KernelBuildError` only, after which `refuses` is asked.
    """

    name: str
    devices: tuple[str, ...]
    run: Callable
    refuses: Callable[..., str | None] = _never
    direct: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Touched:
    """The part of a paged cache that a call reads or writes.

    Attributes:
        blocks: [n] int64, which blocks.
        paged: names of the arguments whose first dimension is the block.
        moved: arguments that name blocks, in the numbering of `blocks`, by name.
    """

    blocks: torch.Tensor
    paged: tuple[str, ...]
    moved: dict[str, torch.Tensor]


@dataclass(frozen=True)
class FusedOp:
    """One fused operation.

    Attributes:
        name: `paged_attention` becomes `torch.ops.gcu.paged_attention`.
        schema: torch schema without the name, e.g. `"(Tensor x, float eps) -> Tensor"`; arguments that
            it writes carry their alias annotation.
        eager: the meaning, in plain torch, on any device; fallback, tests and the shadow check use it.
        fake: output metadata from fake tensors, sizes may be symbolic.
        accumulation: length of the longest sum in one output value as a function of the arguments, which
            with the dtype selects the row of the tolerance table (`kernels/tolerance.py`); None: exact.
        implementations: in order of preference.
        touched: for an operation on a paged cache, which of its blocks a call reads or writes, from the arguments by
            name; the shadow check copies no more than those.
        code_steps: how far an integer result may be from the meaning's: 1 where it is a rounded float that was
            computed on the way, whose last bit may decide; 0: equal.
    """

    name: str
    schema: str
    eager: Callable
    fake: Callable
    accumulation: Callable[..., int] | None = None
    implementations: tuple[Implementation, ...] = ()
    touched: Callable[[dict[str, Any]], Touched] | None = None
    code_steps: int = 0


def register(op: FusedOp) -> FusedOp:
    """Define `torch.ops.gcu.<op.name>` and return `op`. Registering a name twice is an error of ours."""
    assert op.name not in OPS, f"fused operation {op.name!r} is registered twice"
    OPS[op.name] = op
    LIBRARY.define(op.name + with_site(op.schema), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(op.name, functools.partial(dispatch, op), "CompositeExplicitAutograd")
    if has_direct(op):
        LIBRARY.impl(op.name, directly(op), "CPU")
    torch.library.register_fake(f"gcu::{op.name}", lambda *a, site="", **k: op.fake(*a, **k), lib=LIBRARY)
    return op


def with_site(schema: str) -> str:
    """`schema` with the keyword-only argument `site` after all others.

    >>> with_site("(Tensor x) -> Tensor")
    '(Tensor x, *, str site="") -> Tensor'
    """
    arguments, arrow, result = schema.rpartition(") -> ")
    keyword_only = re.search(r"[(,]\s*\*\s*,", arguments) is not None
    comma = "" if arguments == "(" else ", "
    return f'{arguments}{comma}{"" if keyword_only else "*, "}str site=""{arrow}{result}'


def get(name: str) -> FusedOp:
    """The operation called `name`; an unknown one is an error that lists the known."""
    if name not in OPS:
        raise UnknownNameError("fused operation", name, OPS)
    return OPS[name]


def has_direct(op: FusedOp) -> bool:
    """Whether one of its implementations has a short way for layers on the CPU that it knows."""
    return any(implementation.direct for implementation in op.implementations)


def directly(op: FusedOp, otherwise: Callable | None = None) -> Callable:
    """`dispatch` of an `op` that has one, for arguments on the CPU: the implementation's `direct` is asked first.

    Args:
        otherwise: what is called instead of `dispatch`, with the same arguments.
    """
    implementation = next(one for one in op.implementations if one.direct)
    direct, key = implementation.direct, (op.name, implementation.name)

    def call(*args, site: str = "", **kwargs):
        if watcher is None and not watched():
            try:
                result = direct(*args, **kwargs)
            except KernelBuildError:  # the environment changed since; the dispatch meets it too, and says so
                result = None
            if result is not None:
                calls[key] += 1
                return result
        return (otherwise or functools.partial(dispatch, op))(*args, site=site, **kwargs)

    return call


def dispatch(op: FusedOp, *args, site: str = "", **kwargs):
    """Run `op` by the first implementation that takes the arguments, else by its eager meaning."""
    device = _device_type(args, kwargs)
    reasons = []
    for implementation in op.implementations:
        if device not in implementation.devices:
            continue
        reason = implementation.refuses(*args, **kwargs)
        if reason is None:
            calls[op.name, implementation.name] += 1
            return _run(op, implementation.name, implementation.run, site, args, kwargs)
        reasons.append(f"{implementation.name}: {reason}")
    reason = "; ".join(reasons) or f"no implementation for device {device!r}"
    if (op.name, reason) not in fallbacks:
        log.warning("gcu::%s runs as plain torch: %s", op.name, reason)
    fallbacks[op.name, reason] += 1
    calls[op.name, "eager"] += 1
    return _run(op, "eager", op.eager, site, args, kwargs)


def _run(op: FusedOp, implementation: str, run: Callable, site: str, args: tuple, kwargs: dict):
    if watcher is None:
        return run(*args, **kwargs)
    return watcher(op, implementation, run, site, args, kwargs)


def _device_type(args, kwargs) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device.type
    return "cpu"
