"""Inductor's scheduling and wrapper for the device: what is fused, how a kernel is tiled, what stays an operation.

Sort, scan and random numbers have no fast lowering on the card: they stay calls of the vendor's operations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch._inductor.codegen.common import BackendFeature
from torch._inductor.codegen.simd import NodeScheduleMarker
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from gcu_compile.codegen import tiling
from gcu_compile.codegen.analysis_private import Chain, chain, hint, patterns
from gcu_compile.codegen.device import current
from gcu_compile.codegen.kernel_private import GcuKernel
from gcu_compile.errors import LegalityError


class GcuScheduling(TritonScheduling):
    """Triton scheduling whose kernels obey the device's rules."""

    kernel_type = GcuKernel
    backend_features = OrderedSet([BackendFeature.INPLACE_BUFFERS])

    @classmethod
    def get_backend_features(cls, device: Any) -> OrderedSet:
        """Without sort, scan, templates and foreach."""
        return cls.backend_features

    @classmethod
    def get_tiling_and_scores(
        cls, node_schedule: Any, numel: Any, reduction_numel: Any = sympy.S.One, coalesce_analysis: Any = None
    ) -> Any:
        """One flat tree: the kernel's own tiling is decided when it is made, and prevents no fusion."""
        return cls.create_tiling([numel], [reduction_numel]), None

    def can_fuse(self, node1: Any, node2: Any) -> bool:
        """Inductor's answer, unless the fused loops have no common chain of dimensions."""
        if not super().can_fuse(node1, node2):
            return False
        nodes = [n for n in (*node1.get_nodes(), *node2.get_nodes()) if getattr(n, "_body", None) is not None]
        if len(nodes) != len(node1.get_nodes()) + len(node2.get_nodes()):
            return True
        (numel, rnumel) = max((n.group[1] for n in (node1, node2)), key=lambda group: hint(group[1]))
        both = chain(nodes, numel, rnumel)
        apart = [chain(n.get_nodes(), *self._space(n, numel, rnumel)) for n in (node1, node2)]
        if len(both.uneven) > sum(len(one.uneven) for one in apart):
            return False
        # A reduction that fits a tile whole is not cut for the sake of a neighbour.
        return hint(rnumel) == 1 or reduced(both, rnumel) <= max(1, *(reduced(one, rnumel) for one in apart))

    can_fuse_vertical = can_fuse
    can_fuse_horizontal = can_fuse

    @staticmethod
    def _space(node: Any, numel: Any, rnumel: Any) -> tuple[Any, Any]:
        """The space of one of two nodes: a pointwise one before a reduction is not cut at its rows yet."""
        return (numel, rnumel) if node.is_reduction() else node.group[1]

    def create_kernel_choices(self, kernel_features: Any, kernel_args: Any, kernel_kwargs: Any) -> list[GcuKernel]:
        """The one kernel, with its tiling."""
        numel, rnumel = kernel_features.numel, kernel_features.reduction_numel
        if kernel_features.select_index_dtype() == torch.int64:
            names = ", ".join(sorted(kernel_features.buf_accesses()))
            raise LegalityError(
                f"a kernel over {hint(numel * rnumel)} elements (buffers {names}) needs 64-bit offsets, which crash "
                "the card's compiler. Use a smaller batch or fewer tokens at a time: no tensor may have 2**31 elements."
            )
        nodes = list(NodeScheduleMarker.only_nodes(kernel_features.node_schedule))
        sizes, lengths, plan = plan_of(nodes, numel, rnumel)
        if not all(sympy.sympify(length).is_number for length in lengths):
            # The size that is compiled first says nothing about the others: a program for every group of SIPs.
            plan = replace(plan, programs=current().profile.value("sip_count") // plan.num_warps)
        kwargs = {name: value for name, value in kernel_kwargs.items() if name in ("features", "tiling_scores")}
        return [GcuKernel(sizes, plan=plan, lengths=lengths, **kwargs)]


def reduced(found: Chain, rnumel: Any) -> int:
    """Dimensions of a chain that are reduced."""
    limit = hint(rnumel)
    return sum(1 for _, at in found.cuts if 1 < at <= limit)


def plan_of(nodes: list[Any], numel: Any, rnumel: Any) -> tuple[dict[str, Any], list[Any], tiling.Tiling]:
    """Elements per tree, sizes of the chain's dimensions, and the tiling of a kernel."""
    runtime = current()
    assert runtime is not None, "code is generated for a device that was never registered"
    found = chain(nodes, numel, rnumel)
    seen = patterns(nodes, numel, rnumel, found)
    lengths, hints = found.lengths, found.hints
    if hint(rnumel) != 1 or any(node.is_reduction() for node in nodes):
        split = len(hints) - reduced(found, rnumel)
        outer, inner = hints[:split], hints[split:]
        if not outer:
            outer, lengths = [1], [sympy.S.One, *lengths]
            seen = [_shifted(p) for p in seen]
        if not inner:
            inner, lengths = [1], [*lengths, sympy.S.One]
            seen = [tiling.Pattern((*p.strides, 0), p.store, p.index, p.compared) for p in seen]
        plan = tiling.reduction(outer, inner, seen, runtime.profile, fixed=sympy.sympify(rnumel).is_number)
        return {"x": numel, "r0_": rnumel}, lengths, plan
    if not hints:
        hints, lengths = [1], [sympy.S.One]
        seen = [tiling.Pattern((0,), p.store) for p in seen]
    hints, lengths, seen = folded(hints, lengths, seen, runtime.profile.value("inductor_block_max")["X"])
    plan = tiling.pointwise(hints, seen, runtime.profile)
    simplify = V.graph.sizevars.simplify
    sizes = {p: simplify(sympy.prod([lengths[d] for d in tree.dims])) for p, tree in plan.trees.items()}
    return {**sizes, "r0_": sympy.S.One}, lengths, plan


def _shifted(pattern: tiling.Pattern) -> tiling.Pattern:
    """The pattern with a dimension of size 1 put before the others."""
    index, compared = (frozenset(d + 1 for d in dims) for dims in (pattern.index, pattern.compared))
    return tiling.Pattern((0, *pattern.strides), pattern.store, index, compared)


def folded(hints: list[int], lengths: list[Any], seen: list[Any], most: int) -> tuple[Any, Any, Any]:
    """A single long dimension as rows of the largest block, so that one tile holds several."""
    size = hints[0]
    row = most
    while row > 256 and size % row:
        row //= 2
    if len(hints) > 1 or size <= most or size % row or not V.graph.sizevars.statically_known_multiple_of(
        lengths[0], row
    ):
        return hints, lengths, seen
    patterns_ = [
        tiling.Pattern((None if p.strides[0] is None else p.strides[0] * row, *p.strides), p.store, frozenset())
        for p in seen
    ]
    return [size // row, row], [V.graph.sizevars.simplify(lengths[0] // row), sympy.Integer(row)], patterns_


class GcuWrapper(PythonWrapperCodegen):
    """The wrapper of the device: what it calls at run time is in `gcu_compile.codegen.runtime`."""

    @staticmethod
    def create(is_subgraph: bool, *args: Any, **kwargs: Any) -> PythonWrapperCodegen:
        """Inductor's for a subgraph, whose header is its parent's; ours for a graph."""
        return PythonWrapperCodegen.create(is_subgraph, *args, **kwargs) if is_subgraph else GcuWrapper()

    def write_header(self) -> None:
        """Imports, with the runtime that guards and streams come from."""
        super().write_header()
        self.header.splice("import gcu_compile.codegen.runtime as gcu_runtime")
