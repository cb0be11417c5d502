"""All rules, in the order in which they are tried within their step. See docs/adding-a-rule.md."""

from __future__ import annotations

import functools

from gcu_compile.lowering.rule import Rule


@functools.cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule of every step; names are unique."""
    from gcu_compile.lowering.rules import (
        attention,
        canonical,
        dequant_gemm,
        elementwise,
        post_processing,
        prologues,
        rope_and_cache,
    )

    modules = (canonical, attention, rope_and_cache, dequant_gemm, prologues, post_processing, elementwise)
    rules = tuple(rule for module in modules for rule in module.RULES)
    assert len({rule.name for rule in rules}) == len(rules), "two rules share a name"
    return rules
