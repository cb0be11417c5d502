"""Dequantise + matmul + epilogue become `gcu::dequant_gemm` and `gcu::int8_gemm`."""

from __future__ import annotations

from gcu_compile.lowering.rule import Rule

RULES: tuple[Rule, ...] = ()
