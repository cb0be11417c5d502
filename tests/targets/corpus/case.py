"""How a pair of launches, one breaking a rule and one keeping it, is written down."""

from dataclasses import dataclass

from gcu_compile.targets.legality import Specimen


@dataclass(frozen=True)
class Case:
    """`breaks` has a finding of `rule` on `target`; `keeps` has none, and nothing worse than "slow"."""

    rule: str
    breaks: Specimen
    keeps: Specimen
    target: str = "gcu300"


def at(kernel, types="", grid=(1,), warps=4, stages=3, values=None, **constexprs):
    """A launch. `types`: Triton types of the arguments in order, by space."""
    defaults = {p.name: p.default for p in kernel.params if p.has_default}
    constexprs = defaults | constexprs
    names = [name for name in kernel.arg_names if name not in constexprs]
    signature = dict(zip(names, types.split(), strict=True))
    return Specimen(kernel, signature, constexprs, grid, warps, stages, values or {}, kernel.__name__)


def rule(name, breaks, keeps, target="gcu300"):
    return Case(name, breaks, keeps, target)
