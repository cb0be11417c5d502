"""What a mask says: tensors that are functions of their own indices, read from the graph that makes them.

    iota, full, +, -, *, views, slices, cat, index     -> Affine:    const + sum of coefficient * index
    <, <=, ==, and, or, not                            -> Condition: a conjunction of affine forms that are >= 0
    where(condition, a, b), casts, + and * by numbers  -> TwoValued: a where the condition holds, b elsewhere

So that `arange(n)[None] <= arange(n)[:, None]` is known to be a causal mask however it is spelled, with symbolic
sizes too. What is not known is `None`; a condition with an unknown part keeps what is known, and is not `exact`.
Comparisons of sizes go through `same_size` and `at_least`, which add no guard.
"""

from __future__ import annotations

from gcu_compile.lowering.positions import readers  # noqa: F401  (registers them)
from gcu_compile.lowering.positions.forms import Affine, Condition, Positions, TwoValued, always, at_least

__all__ = ["Affine", "Condition", "Positions", "TwoValued", "always", "at_least"]
