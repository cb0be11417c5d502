"""`gcu::linear`: a product with a weight of floats that was packed once.

Decode reads every weight for one row or some. oneDNN, which vLLM's CPU build calls, reads its packed weights at 0.4 to
0.6 of memory's speed then (`docs/benchmarks/2026-11-29-host-no-amx.md`); ours lie in the order in which one row reads
them.
"""

from __future__ import annotations

import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.host import linear as host
from gcu_compile.kernels.linear import eager
from gcu_compile.kernels.linear.eager import STRIP, pack, unpack

__all__ = ["LINEAR", "is_fastest", "pack", "unpack"]
is_fastest = host.is_fastest


def check(x: torch.Tensor, weight: torch.Tensor, n: int, bias: torch.Tensor | None = None) -> None:
    """Raise `InvalidInputError` for arguments that have no meaning."""
    if not x.is_floating_point() or weight.dtype != x.dtype:
        raise InvalidInputError(f"gcu::linear: x is {x.dtype}, weight {weight.dtype}; expected the same floats")
    if x.dim() == 0:
        raise InvalidInputError("gcu::linear: x is a single number, expected [..., K]")
    expected = [-(-n // STRIP), -(-x.shape[-1] // 2), STRIP, 2]
    if n < 0 or list(weight.shape) != expected:
        raise InvalidInputError(
            f"gcu::linear: weight is {list(weight.shape)}, expected {expected}: {n} outputs of {x.shape[-1]} inputs as "
            "gcu_compile.kernels.linear.pack makes it"
        )
    if bias is not None and (tuple(bias.shape) != (n,) or not bias.is_floating_point()):
        raise InvalidInputError(f"gcu::linear: bias is {list(bias.shape)} {bias.dtype}, expected floats [{n}]")


def _checked(run):
    def call(*args, **kwargs):
        check(*args, **kwargs)
        return run(*args, **kwargs)

    return call


LINEAR = registry.register(
    registry.FusedOp(
        "linear",
        "(Tensor x, Tensor weight, int n, Tensor? bias=None) -> Tensor",
        eager=_checked(eager.linear),
        fake=lambda x, weight, n, bias=None: x.new_empty((*x.shape[:-1], n)),
        accumulation=lambda x, *args, **kwargs: x.shape[-1],
        implementations=(registry.Implementation("host_cpp", ("cpu",), _checked(host.run), host.refuses, host.direct),),
    )
)
