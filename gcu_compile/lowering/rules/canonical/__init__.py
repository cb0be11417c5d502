"""Canonical forms: one spelling of each thing, so that one rule meets one form.

    views.py        views and copies that do nothing, views of views, split and chunk as slices
    casts.py        casts that do nothing, round trips through a wider dtype
    arithmetic.py   x ** 2, 1 / sqrt(x), sum / n, mm + bias, integer products of shifted codes

All of them are exact, but for `mean_of_sum` and `bias_of_mm`, which round as the fused operation of torch does.
"""

from __future__ import annotations

from gcu_compile.lowering.rules.canonical import arithmetic, casts, views
from gcu_compile.lowering.rules.canonical.casts import HOLDS

__all__ = ["HOLDS", "RULES"]

RULES = (*views.RULES, *casts.RULES, *arithmetic.RULES)
