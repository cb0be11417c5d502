"""The logits chain becomes `gcu::sample`."""

from __future__ import annotations

from gcu_compile.lowering.rule import Rule

RULES: tuple[Rule, ...] = ()
