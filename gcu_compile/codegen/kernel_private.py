"""One Triton kernel for the device, written from Inductor's loop bodies.

    for tile in range(tl.program_id(0), TILES, tl.num_programs(0)):       # a grid of at most one program per SIP group
        ytile = tile // XTILES                                            # scalars: div and mod are allowed on them
        xrow, xoffset = ...
        xlane = xoffset + tl.arange(0, XBLOCK)                            # one arange per tiled dimension
        x0 = xlane; x1 = (xrow // 32) % 8                                 # positions: a lane, or a scalar
        tmp0 = tl.load(in_ptr0 + (x0 + 64*x1), xmask, other=0.0)

A tile never straddles its innermost dimension, so that a tensor of offsets is only ever an arange, times a constant,
plus scalars. `tiling.py` decides what is tiled.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor.codegen.common import CSEVariable, DeferredLine
from torch._inductor.codegen.triton import FixedTritonConfig, IndexingOptions, TritonKernel
from torch._inductor.runtime.triton_heuristics import FixedGrid
from torch._inductor.shape_propagation import get_broadcasted_shape
from torch._inductor.utils import IndentedBuffer, sympy_subs
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet
from torch.utils._sympy.functions import CeilDiv, FloorDiv, ModularIndexing
from torch.utils._sympy.symbol import SymT, symbol_is_type

from gcu_compile.codegen.analysis_private import plain
from gcu_compile.codegen.overrides_private import GcuOverrides
from gcu_compile.codegen.reduction_private import Reductions, block_name, mask_name
from gcu_compile.codegen.tiling import Tiling

NUM_STAGES = 3
IMPORTS = """
import triton
import triton.language as tl

from gcu_compile.codegen import launch as triton_heuristics
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


class GcuKernel(Reductions, TritonKernel):
    """A kernel whose tile, grid and block sizes are decided when it is written."""

    overrides = GcuOverrides
    allow_block_ptr = False

    def __init__(self, sizes: dict[str, Any], *, plan: Tiling, lengths: list[Any], **kwargs: Any):
        """
        Args:
            sizes: elements per tree, outermost first (Inductor's tiling).
            plan: how the trees are tiled.
            lengths: sizes of the chain's dimensions that `plan` speaks of.
        """
        self.plan, self.lengths = plan, lengths
        blocks = {f"{prefix.upper()}BLOCK": tree.block for prefix, tree in plan.trees.items()}
        config = FixedTritonConfig({**blocks, "num_warps": plan.num_warps, "num_stages": NUM_STAGES})
        super().__init__(sizes, fixed_config=config, override_cooperative_reduction=False, **kwargs)

    # ---- what Inductor asks of a kernel

    def should_use_persistent_reduction(self) -> bool:
        return self.inside_reduction and self.plan.persistent

    def want_no_x_dim(self) -> bool:
        return False

    def get_index_dtype_as_torch_dtype(self) -> torch.dtype:
        return torch.int32

    def construct_range_trees(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Inductor's trees; those walked as scalars have no dimension of the tile."""
        self._index_dtype = torch.int32
        trees = super().construct_range_trees(*args, **kwargs)
        dims = 0
        for tree in trees:
            tree.tensor_dim = None
            active = not tree.is_reduction or self.features.is_reduction()
            if active and self.block(tree) > 1:
                tree.tensor_dim = dims
                dims += 1
        return trees

    def block(self, tree: Any) -> int:
        """Block size of a tree; 1 if it is walked."""
        planned = self.plan.trees.get(tree.prefix)
        return planned.block if planned else 1

    def lane(self, tree: Any) -> Any:
        """Size of the dimension that a tree's block lies in; 1 if it is walked."""
        planned = self.plan.trees.get(tree.prefix)
        if planned is None or planned.block == 1:
            return sympy.S.One
        return sympy.sympify(self.lengths[planned.dims[-1]])

    def tiles(self, tree: Any) -> Any:
        """Tiles along one tree."""
        lane = self.lane(tree)
        return V.graph.sizevars.simplify(FloorDiv(tree.numel, lane) * CeilDiv(lane, self.block(tree)))

    def lane_shape(self, tree: Any) -> tuple[str, ...]:
        """Shape of a tree's lanes; () for a walked one."""
        if tree.tensor_dim is None:
            return ()
        shape = ["1"] * self.triton_tensor_ndim()
        shape[tree.tensor_dim] = block_name(tree)
        return tuple(shape)

    def varies(self, entry: Any) -> bool:
        """Whether a position differs within a tile."""
        if entry.root.tensor_dim is None:
            return False
        return not V.graph.sizevars.statically_known_multiple_of(entry.divisor, self.lane(entry.root))

    def _has_constant_mask(self, tree: Any) -> bool:
        if tree.tensor_dim is None:
            return True
        return V.graph.sizevars.statically_known_multiple_of(self.lane(tree), self.block(tree))

    # ---- positions

    def text(self, expression: Any) -> str:
        """A size or an index as it is spelled in the kernel; in parentheses if it is more than a name or a number."""
        text = self.kexpr(self.rename_indexing(sympy.sympify(expression)))
        return text if text.isalnum() else f"({text})"

    def codegen_reduction_numels(self, buffer: Any) -> None:
        """Inductor's RBLOCK and rindex are not used."""

    def codegen_range_tree(self) -> None:
        for tree in self.range_trees:
            if not tree.is_loop and (not tree.is_reduction or self.inside_reduction):
                self.iteration_ranges_codegen_header(tree, self.body)

    def iteration_ranges_codegen_header(self, entry: Any, code: Any) -> None:
        """Rows, lanes, mask and flat index of a tree, from its tile number."""
        p, lane, block = entry.prefix, self.lane(entry), self.block(entry)
        if entry.is_reduction and not entry.is_loop:
            code.writeline(f"{p}tile = 0")
        if entry.tensor_dim is None:
            code.writeline(f"{entry.name} = {p}tile")
            return
        per_row = V.graph.sizevars.simplify(CeilDiv(lane, block))
        if per_row == 1:
            code.writeline(f"{p}row = {p}tile")
            offset = ""
        elif V.graph.sizevars.statically_known_equals(lane, entry.numel):
            code.writeline(f"{p}row = 0")
            offset = f"{p}tile * {block} + "
        else:
            code.writeline(f"{p}row = {p}tile // {self.text(per_row)}")
            offset = f"({p}tile % {self.text(per_row)}) * {block} + "
        size = self.indexing_size_str(entry.tensor_dim) if self.triton_tensor_ndim() > 1 else ""
        code.writeline(f"{p}lane = {offset}tl.arange(0, {block_name(entry)}){size}")
        if not self._has_constant_mask(entry):
            code.writeline(f"{mask_name(entry)} = {p}lane < {self.text(lane)}")
        if V.graph.sizevars.statically_known_equals(lane, entry.numel):
            code.writeline(f"{entry.name} = {p}lane")
        else:
            code.writeline(f"{entry.name} = {p}row * {self.text(lane)} + {p}lane")

    def codegen_iteration_ranges_entry(self, entry: Any) -> None:
        line = f"{entry.name} = {self._position(entry)}"
        (self.indexing_code if entry.root.is_loop else self.body).writeline(line)

    def _position(self, entry: Any) -> str:
        root, p, known = entry.root, entry.root.prefix, V.graph.sizevars
        lane = self.lane(root)
        if root.tensor_dim is None:
            return self.text(entry.expr)
        whole = known.statically_known_equals(entry.divisor * entry.length, root.numel)
        if known.statically_known_equals(entry.divisor, 1):
            if known.statically_known_equals(entry.length, lane):
                return f"{p}lane"
            if whole:
                return root.name
            if known.statically_known_multiple_of(entry.length, lane):
                rows = known.simplify(FloorDiv(entry.length, lane))
                return f"({p}row % {self.text(rows)}) * {self.text(lane)} + {p}lane"
        if known.statically_known_multiple_of(entry.divisor, lane):
            step = known.simplify(FloorDiv(entry.divisor, lane))
            row = f"{p}row" if step == 1 else f"({p}row // {self.text(step)})"
            return row if whole else f"{row} % {self.text(entry.length)}"
        # A cut inside the lane: division on a tensor, which the compiler turns into a gather.
        return self.text(entry.expr)

    def cut(self, index: Any) -> Any:
        """Quotients and remainders of a position, as positions of their own that the tree computes from scalars."""
        known, replaced, index = V.graph.sizevars, {}, plain(index)
        for part in index.atoms(FloorDiv, ModularIndexing):
            entry = self.range_tree_nodes.get(part.args[0])
            if entry is None:
                continue
            step = part.args[1]
            length = part.args[2] if isinstance(part, ModularIndexing) else FloorDiv(entry.length, step)
            if known.statically_known_multiple_of(entry.length, step * length):
                replaced[part] = entry.root.lookup(entry.divisor * step, length).symbol()
        return sympy_subs(index, replaced) if replaced else index

    def indexing(self, index: Any, *, override_mask: str | None = None, **_: Any) -> IndexingOptions:
        """An index, the shape it spans, and the masks that bound it."""
        index = self.prepare_indexing(self.cut(index))
        shape: tuple[Any, ...] = ()
        masks: OrderedSet[Any] = OrderedSet()
        reduced = False
        for symbol in sorted(index.free_symbols, key=str):
            entry = self.range_tree_nodes.get(symbol)
            if entry is not None:
                reduced = reduced or entry.root.is_reduction
                if self.varies(entry):
                    shape = get_broadcasted_shape(shape, self.lane_shape(entry.root))
                    masks.add(mask_name(entry.root))
            elif symbol_is_type(symbol, SymT.TMP):
                loaded = self.cse.varname_map[symbol.name]
                shape = get_broadcasted_shape(shape, tuple(loaded.shape))
                masks.update(loaded.mask_vars)
        text = self.index_to_str(index)
        if override_mask:
            masks = OrderedSet([override_mask])
        if self._load_mask is not None:
            masks.add(self._load_mask)
            wide = get_broadcasted_shape(shape, tuple(self._load_mask.shape))
            if wide != shape:
                size = f"[{', '.join(map(str, wide))}]"
                text = f"tl.broadcast_to({text}, {size})" if shape else f"tl.full({size}, {text}, tl.int32)"
                shape = wide
        self.filter_masks(masks)
        return IndexingOptions(text, masks, None, reduced, index, expand_shape=shape)

    # ---- memory

    def load(self, name: str, index: Any) -> CSEVariable:
        from torch._inductor.codegen.triton import should_unwrap_unspec_arg  # moved between versions

        var, dtype = self.args.input(name), V.graph.get_dtype(name)
        indexing = self.indexing(index)
        shape = tuple(indexing.expand_shape)
        if should_unwrap_unspec_arg(name):
            line, shape = var, ()
        else:
            other = ""
            if indexing.has_mask() and (indexing.has_tmpmask() or indexing.has_rindex()):
                other = f", other={self._other(dtype)}"
            mask = f", {indexing.mask_str}" if indexing.has_mask() else ""
            line = f"tl.load({var} + ({indexing.index_str}){mask}{other})"
        if dtype in (torch.float16, torch.bfloat16):
            line, dtype = f"{line}.to(tl.float32)", torch.float32
        elif dtype == torch.bool:
            line = f"{line}.to(tl.int1)"
        buffer = self.get_load_buffer(indexing)
        variable = self.cse.generate(buffer, line, dtype=dtype, shape=shape)
        variable.mask_vars = indexing.mask_vars
        if not self.inside_reduction or not indexing.has_rindex():
            self.outside_loop_vars.add(variable)
        return variable

    def _other(self, dtype: torch.dtype) -> str:
        from torch._inductor.codegen.simd import constant_repr

        value = self._load_other or 0
        return constant_repr(float(value) if dtype.is_floating_point else int(value))

    def store(self, name: str, index: Any, value: CSEVariable, mode: str | None = None) -> None:
        var = self.args.output(name)
        indexing = self.indexing(index)
        mask = f", {indexing.mask_str}" if indexing.has_mask() else ""
        where = f"{var} + ({indexing.index_str})"
        if mode == "atomic_add":
            self.atomic_add_found = True
            line = f"tl.atomic_add({where}, {value}{mask}, sem='relaxed')"
        elif mode is None or mode == "tma":
            line = f"tl.store({where}, {value}{mask})"
        else:
            raise NotImplementedError(f"store mode={mode}")
        self.stores.writeline(DeferredLine(name, line))
        if not self.inside_reduction:
            self.outside_loop_vars.add(value)

    # ---- the whole kernel

    def codegen_body(self) -> None:
        parts = (self.indexing_code, self.loads, self.compute, self.stores)
        if not any((*parts, self.post_loop_combine, self.post_loop_store)):
            return
        loop = next((tree for tree in self.range_trees if tree.is_loop), None)
        if self.inside_reduction and loop is not None:
            self.body.writeline(f"for {loop.prefix}tile in range(0, {self.text(self.tiles(loop))}):")
            with self.body.indent():
                self.iteration_ranges_codegen_header(loop, self.body)
                for part in parts:
                    self.body.splice(part)
            self.cse.invalidate(self.outside_loop_vars)
            loop.cache_clear()
        else:
            for part in parts:
                self.body.splice(part)
        self.body.splice(self.post_loop_combine)
        self.body.splice(self.post_loop_store)
        for part in (*parts, self.post_loop_combine, self.post_loop_store):
            part.clear()

    def codegen_kernel(self, name: str | None = None) -> str:
        self.codegen_body()
        trees = [tree for tree in self.range_trees if not tree.is_reduction]
        counts = [self.tiles(tree) for tree in trees]
        body = IndentedBuffer()
        body.writeline(
            f"for tile in range(tl.program_id(0), {self.text(sympy.prod(counts))}, tl.num_programs(0)):"
        )
        with body.indent():
            inner = sympy.S.One
            for tree, count in reversed([*zip(trees, counts, strict=True)]):
                part = "tile" if inner == 1 else f"tile // {self.text(inner)}"
                inner = inner * count
                outermost = tree is trees[0]
                part = part if outermost else f"({part}) % {self.text(count)}"
                body.writeline(f"{tree.prefix}tile = {part}")
            body.splice(self.body)
        self.body = body
        return super().codegen_kernel(name).replace("triton_helpers.set_driver_to_gpu()\n", "")

    @classmethod
    def gen_common_triton_imports(cls) -> str:
        return IMPORTS

    def _get_grid_type(self) -> type:
        return FixedGrid

    def inductor_meta_common(self) -> dict[str, Any]:
        programs = [str(self.plan.programs), "1", "1"]
        return {**super().inductor_meta_common(), "fixed_grid": programs}

    def codegen_static_numels(self, code: Any) -> None:
        """Sizes are written where they are used; only a persistent reduction's block is a name without argument."""
        for tree in self.range_trees:
            if tree.is_reduction and self.persistent_reduction and tree.tensor_dim is not None:
                code.writeline(f"{block_name(tree)}: tl.constexpr = {self.block(tree)}")
