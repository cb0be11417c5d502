"""Attention: SDPA in all its spellings and decomposed attention become `gcu::attention`."""

from __future__ import annotations

from gcu_compile.lowering.rule import Rule

RULES: tuple[Rule, ...] = ()
