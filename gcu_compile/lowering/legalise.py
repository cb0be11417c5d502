"""The step for cards: no 64-bit tensor is left for Inductor to generate code for, and vendor's operations stay calls.

A gcu300 kernel cannot hold an i64 or f64. Indices, masks and counts in an LLM's graph are int64 by PyTorch's habit and
fit 32 bits; so every int64 tensor becomes int32 and every float64 one float32. At the graph's border, and around an
operation that insists on int64, a cast is left that the vendor's runtime does (a call, not generated code). A constant
that does not fit 32 bits stays 64-bit, and what computes with it is left to the vendor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import map_arg

from gcu_compile.lowering.attention_dtype import keep_dtype
from gcu_compile.lowering.pairs import unroll_pairs
from gcu_compile.lowering.provenance import inherit
from gcu_compile.lowering.rule import value_of

aten, prims = torch.ops.aten, torch.ops.prims
NARROW = {torch.int64: torch.int32, torch.float64: torch.float32}
INT32 = torch.iinfo(torch.int32)
# Slow or wrong when generated for the card (sort, scan, top-k, random numbers, argmax on int64): the vendor's are used.
VENDOR = frozenset(
    [
        aten.argmax,
        aten.argmin,
        aten.sort,
        aten.topk,
        aten.kthvalue,
        aten.mode,
        aten.median,
        aten.nanmedian,
        aten.cumsum,
        aten.cumprod,
        aten.cummax,
        aten.cummin,
        aten.logcumsumexp,
        aten.multinomial,
        aten.bernoulli,
        aten.rand,
        aten.randn,
        aten.randint,
        aten.randperm,
        aten.rand_like,
        aten.randn_like,
        aten.normal,
        aten.exponential,
        aten.uniform,
        aten.histc,
        aten.bincount,
        aten.nonzero,
        aten.unique_consecutive,
        aten.searchsorted,
        aten.bucketize,
    ]
)
# max and min along a dimension return the position too.
VENDOR_OVERLOADS = frozenset((aten.max.dim, aten.min.dim))
PURE_VIEWS = frozenset((aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim))
FALLBACK = "should_fallback"  # Inductor's mark of a node that it must not generate code for


def legalise(gm: torch.fx.GraphModule) -> dict[str, int]:
    """Narrow `gm` in place. Returns how often each thing was done, for the report."""
    before = {"attention_kept_dtype": keep_dtype(gm), "pairs_unrolled": unroll_pairs(gm)}
    return {**_Narrowing(gm).run(), **{name: count for name, count in before.items() if count}}


def _is_wide(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in NARROW


class _Narrowing:
    def __init__(self, gm: torch.fx.GraphModule):
        self.graph = gm.graph
        self.done = {"narrowed": 0, "border_casts": 0, "vendor_operations": 0, "left_wide": 0}
        # Narrowed node -> the same values in 64 bits, where an operation insisted on them.
        self.widened: dict[torch.fx.Node, torch.fx.Node] = {}
        modes = [v.fake_mode for n in self.graph.nodes if isinstance(v := value_of(n), torch._subclasses.FakeTensor)]
        self.mode = modes[0] if modes else None

    def run(self) -> dict[str, int]:
        if self.mode is None:
            return self.done
        outputs = self.outputs()
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "get_attr"):
                self.border(node)
            elif node.op == "call_function":
                self.operation(node)
        self.restore(outputs)
        return {name: count for name, count in self.done.items() if count}

    # ---- the graph's border

    def outputs(self) -> list[tuple[torch.fx.Node, torch.dtype]]:
        """What the graph returns in 64 bits."""
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        return [(n, value_of(n).dtype) for n in output.all_input_nodes if _is_wide(value_of(n))]

    def border(self, node: torch.fx.Node) -> None:
        value = value_of(node)
        users = [user for user in node.users if user.op != "output" and not _writes(user, node)]
        if not _is_wide(value) or not users:
            return
        after = node
        while after.next.op == "placeholder":
            after = after.next
        cast = self.cast(node, NARROW[value.dtype], after)
        cast.meta["narrowed"], self.widened[cast] = value.dtype, node
        node.replace_all_uses_with(cast, delete_user_cb=lambda user: user in users)
        self.done["border_casts"] += 1

    def restore(self, outputs: list[tuple[torch.fx.Node, torch.dtype]]) -> None:
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        for node, dtype in outputs:
            if node in output.all_input_nodes and value_of(node).dtype != dtype:
                cast = self.cast(node, dtype, output.prev)
                output.replace_input_with(node, cast)
                self.done["border_casts"] += 1

    def cast(self, node: torch.fx.Node, dtype: torch.dtype, after: torch.fx.Node) -> torch.fx.Node:
        """A cast after `after` that the vendor's runtime does."""
        with self.graph.inserting_after(after):
            new = self.graph.call_function(prims.convert_element_type.default, (node, dtype))
        inherit(new, node)
        new.meta[FALLBACK] = True
        with self.mode:
            new.meta["val"] = value_of(node).to(dtype)
        return new

    # ---- operations

    def operation(self, node: torch.fx.Node) -> None:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in VENDOR or node.target in VENDOR_OVERLOADS:
            node.meta[FALLBACK] = True
            self.done["vendor_operations"] += 1
        if not isinstance(node.target, torch._ops.OpOverload) and value_of(node) is None:
            return
        before = value_of(node)
        touched = _touches(before) or any(n.meta.get("narrowed") or _touches(value_of(n)) for n in node.all_input_nodes)
        if not touched:
            return
        stays = any(n.meta.get("stays_wide") for n in node.all_input_nodes)
        if stays or any(not INT32.min <= number <= INT32.max for number in _numbers(node)):
            self.leave(node)
            return
        if FALLBACK in node.meta or node.target.__class__ is not torch._ops.OpOverload:
            self.settle(node, self.evaluate(node))
            return
        args, kwargs = _map_dtypes(node.args), _map_dtypes(dict(node.kwargs))
        if any(a.name == "dtype" for a in node.target._schema.arguments) and _touches(before) and _promotes(node):
            kwargs["dtype"] = NARROW[before.dtype]
        node.args, node.kwargs = args, kwargs
        self.settle(node, self.evaluate(node))

    def evaluate(self, node: torch.fx.Node) -> Any:
        """The node's value for its inputs as they are now; widens those that the operation insists on."""
        try:
            return self.value(node)
        except (RuntimeError, IndexError, TypeError, ValueError, AssertionError, NotImplementedError):
            for source in list(node.all_input_nodes):
                if source.meta.get("narrowed") and value_of(source).dtype in NARROW.values():
                    node.replace_input_with(source, self.wide(source))
            return self.value(node)

    def wide(self, source: torch.fx.Node) -> torch.fx.Node:
        if source not in self.widened:
            self.widened[source] = self.cast(source, source.meta["narrowed"], source)
            self.done["border_casts"] += 1
        return self.widened[source]

    def value(self, node: torch.fx.Node) -> Any:
        args, kwargs = map_arg((node.args, dict(node.kwargs)), value_of)
        with self.mode:
            return node.target(*args, **kwargs)

    def settle(self, node: torch.fx.Node, value: Any) -> None:
        """Record the new value; what is wide still is cast after the operation, which is left to the vendor."""
        before = value_of(node)
        node.meta["val"] = value
        if _is_wide(value):
            if not _is_getitem(node):
                node.meta[FALLBACK] = True
                self.done["left_wide"] += 1
            users = [user for user in node.users if user.op != "output"]
            if not users:
                return
            cast = self.cast(node, NARROW[value.dtype], node)
            cast.meta["narrowed"] = value.dtype
            node.replace_all_uses_with(cast, delete_user_cb=lambda user: user in users and user is not cast)
        elif _is_wide(before):
            node.meta["narrowed"] = before.dtype
            self.done["narrowed"] += 1

    def leave(self, node: torch.fx.Node) -> None:
        """An operation on values that need 64 bits: the vendor's, and so is what uses its result."""
        for source in list(node.all_input_nodes):
            if source.meta.get("narrowed"):
                node.replace_input_with(source, self.wide(source))
        if not _is_getitem(node):
            node.meta[FALLBACK] = True
            self.done["left_wide"] += 1
        node.meta["val"] = value = self.value(node)
        node.meta["stays_wide"] = _touches(value)


def _touches(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(_is_wide(part) for part in parts)


def _is_getitem(node: torch.fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _writes(user: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether `user` writes into `source`: a copy back into an input keeps that input's type."""
    return user.target is aten.copy_.default and bool(user.args) and user.args[0] is source


def _promotes(node: torch.fx.Node) -> bool:
    """Whether the operation widens integers by itself: sums and products."""
    return getattr(node.target, "overloadpacket", None) in (aten.sum, aten.prod)


def _numbers(node: torch.fx.Node) -> list[Any]:
    """Numbers among the arguments that are values; a slice's end may be anything."""
    if getattr(node.target, "overloadpacket", None) in (aten.slice, aten.slice_scatter, aten.as_strided):
        return []
    found: list[Any] = []

    def visit(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for part in value:
                visit(part)
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(value)

    visit([node.args, list(node.kwargs.values())])
    return found


def _map_dtypes(value: Any) -> Any:
    """`value` with 64-bit dtypes replaced."""
    convert: Callable[[Any], Any] = _map_dtypes
    if isinstance(value, torch.dtype):
        return NARROW.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(convert, value))
    if isinstance(value, dict):
        return {name: convert(part) for name, part in value.items()}
    return value
