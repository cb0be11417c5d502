"""Reductions without multi-operand `tl.reduce`: sums, products, extrema; Welford and softmax from those.

A persistent reduction has all of a row in its tile. A looped one keeps one partial result per lane and reduces the
lanes after the loop; where the reduced axis is walked as a scalar there are no lanes to reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.simd import constant_repr
from torch._inductor.codegen.triton import triton_acc_type, upcast_acc_dtype
from torch._inductor.virtualized import _ops as ops


def block_name(tree: Any) -> str:
    """The constexpr argument that holds a tree's block size; torch 2.11 has no method for it."""
    return f"{tree.prefix.upper()}BLOCK"


def mask_name(tree: Any) -> str:
    """The variable that bounds a tree's lanes."""
    return f"{tree.prefix}mask"


FUNCTIONS = {"sum": "tl.sum", "max": "tl.max", "min": "tl.min", "any": "tl.max", "prod": "triton_helpers.prod"}
LIMITS = {"max": "-inf", "min": "inf"}


class Reductions:
    """Mixed into the kernel."""

    def reduction(self, dtype: torch.dtype, src_dtype: torch.dtype, reduction_type: Any, value: Any) -> Any:
        """Reduce `value` along the reduced axis; the result has size 1 there."""
        if reduction_type == "welford_reduce":
            return self._welford_pair(value)
        if reduction_type == "online_softmax_reduce":
            return self._softmax_pair(value)
        if reduction_type not in FUNCTIONS:
            raise NotImplementedError(f"{reduction_type} is left to the vendor's operation")
        key = (src_dtype, reduction_type, value)
        if key not in self.cse.reduction_cache:
            self.cse.reduction_cache[key] = self._reduce(reduction_type, self._wide(value))
        return self.cse.reduction_cache[key]

    # ---- pieces

    def _wide(self, value: Any) -> Any:
        """16-bit floats in float32, bool in int32: the types that sums and extrema are taken in."""
        if value.dtype == torch.bool:
            return ops.to_dtype(value, torch.int32)
        small = value.dtype.is_floating_point and value.dtype.itemsize < 4
        return ops.to_dtype(value, torch.float32) if small else value

    def _tree(self) -> Any:
        return self.range_trees[-1]

    def _result_shape(self) -> tuple[str, ...]:
        tree, shape = self._tree(), list(self.dense_size_list())
        if tree.tensor_dim is not None:
            shape[tree.tensor_dim] = "1"
        return tuple(shape) if len(shape) > (tree.tensor_dim is not None) else ()

    def _condition(self) -> str:
        masks = [] if self._has_constant_mask(self._tree()) else [mask_name(self._tree())]
        if self._load_mask is not None:
            masks.append(str(self._load_mask))
        return " & ".join(masks)

    def _lanes(self, function: str, value: Any) -> str:
        """`function` over the lanes of the reduced axis, which stays as a dimension of size 1."""
        tree = self._tree()
        if tree.tensor_dim is None:
            return str(value)
        text = f"{function}({value}, {tree.tensor_dim})"
        if self.triton_tensor_ndim() == 1:
            return text
        sizes = [":"] * self.triton_tensor_ndim()
        sizes[tree.tensor_dim] = "None"
        return f"{text}[{', '.join(sizes)}]"

    def _dense(self, value: Any) -> Any:
        """A value that is the same along the reduced axis counts once per element of it."""
        if tuple(value.shape) == tuple(self.dense_size_list()):
            return value
        size = self.dense_size_str()
        shape = tuple(self.dense_size_list())
        if not shape:
            return value
        text = f"tl.broadcast_to({value}, {size})" if tuple(value.shape) else f"tl.full({size}, {value}, {_tl(value)})"
        return self.cse.generate(self.compute, text, dtype=value.dtype, shape=shape)

    def _new(self, dtype: torch.dtype) -> Any:
        result = self.cse.newvar(dtype=dtype, shape=self._result_shape())
        result.mask_vars = type(result.mask_vars)(
            mask_name(tree)
            for tree in self.range_trees
            if not tree.is_reduction and tree.tensor_dim is not None and not self._has_constant_mask(tree)
        )
        self.outside_loop_vars.add(result)
        return result

    def _default(self, reduction_type: str, dtype: torch.dtype) -> str:
        kind = "max" if reduction_type == "any" else reduction_type
        return constant_repr(ir.Reduction.default_accumulator(kind, dtype))

    def _accumulator(self, name: str, default: str, dtype: torch.dtype) -> Any:
        shape = tuple(self.dense_size_list())
        size = self.dense_size_str() if shape else "[]"
        self.body.writeline(f"{name} = tl.full({size}, {default}, {triton_acc_type(dtype)})")
        return self.cse.namedvar(name, dtype=dtype, shape=shape)

    def _update(self, accumulator: Any, updated: Any) -> None:
        condition = self._condition()
        text = f"tl.where({condition}, {updated}, {accumulator})" if condition else updated
        self.compute.writeline(f"{accumulator} = {text}")

    def _reduce(self, kind: str, value: Any) -> Any:
        function, dtype = FUNCTIONS[kind], upcast_acc_dtype(value.dtype)
        dtype = torch.int32 if dtype == torch.int64 else dtype
        value, default, condition = self._dense(value), self._default(kind, value.dtype), self._condition()
        result = self._new(dtype)
        if self.persistent_reduction:
            if condition:
                text = f"tl.where({condition}, {value}, {default})"
                value = self.cse.generate(self.compute, text, dtype=value.dtype, shape=value.shape)
            self.compute.writeline(f"{result} = {self._lanes(function, value)}")
        else:
            accumulator = self._accumulator(f"_{result}", default, dtype)
            combine = ir.get_reduction_combine_fn("max" if kind == "any" else kind, dtype)
            self._update(accumulator, combine(accumulator, value))
            self.post_loop_combine.writeline(f"{result} = {self._lanes(function, accumulator)}")
        if kind == "any":
            flag = self.cse.newvar(dtype=torch.bool, shape=result.shape)
            flag.mask_vars = result.mask_vars
            self.outside_loop_vars.add(flag)
            buffer = self.compute if self.persistent_reduction else self.post_loop_combine
            buffer.writeline(f"{flag} = {result} != 0")
            return flag
        return result

    def _welford_pair(self, value: Any) -> tuple[Any, Any, Any]:
        """Mean, sum of squared deviations, and count."""
        value = self._wide(value)
        if self.persistent_reduction:
            return self.welford_reduce_fallback(torch.float32, value)
        value = self._dense(value)
        results = tuple(self._new(torch.float32) for _ in range(3))
        names = [f"_{results[0]}_{part}" for part in ("mean", "m2", "count")]
        mean, m2, count = (self._accumulator(name, "0.0", torch.float32) for name in names)
        self.compute.splice(
            f"""
            {count}_next = {count} + 1.0
            {mean}_next = {mean} + ({value} - {mean}) / {count}_next
            {m2}_next = {m2} + ({value} - {mean}) * ({value} - {mean}_next)
            """
        )
        for part in (mean, m2, count):
            self._update(part, f"{part}_next")
        out_mean, out_m2, out_count = results
        self.post_loop_combine.splice(
            f"""
            {out_count} = {self._lanes("tl.sum", count)}
            {out_mean} = {self._lanes("tl.sum", f"{mean} * {count}")} / {out_count}
            {mean}_off = {mean} - {out_mean}
            {out_m2} = {self._lanes("tl.sum", f"{m2} + {count} * {mean}_off * {mean}_off")}
            """
        )
        return results

    def _softmax_pair(self, value: Any) -> tuple[Any, Any]:
        """Maximum, and sum of exponentials after subtracting it."""
        value = self._wide(value)
        if self.persistent_reduction:
            return self.prepare_softmax_twopass_fallback(torch.float32, value)
        value = self._dense(value)
        out_max, out_sum = self._new(torch.float32), self._new(torch.float32)
        most = self._accumulator(f"_{out_max}_max", 'float("-inf")', torch.float32)
        total = self._accumulator(f"_{out_max}_sum", "0.0", torch.float32)
        # Where nothing finite was seen yet, the old sum is 0 and must not be scaled by exp(-inf + inf).
        self.compute.splice(
            f"""
            {most}_next = tl.maximum({most}, {value})
            {most}_safe = tl.where({most}_next == float("-inf"), 0.0, {most}_next)
            {total}_next = {total} * tl.exp({most} - {most}_safe) + tl.exp({value} - {most}_safe)
            """
        )
        for part in (most, total):
            self._update(part, f"{part}_next")
        self.post_loop_combine.splice(
            f"""
            {out_max} = {self._lanes("tl.max", most)}
            {out_max}_safe = tl.where({out_max} == float("-inf"), 0.0, {out_max})
            {out_sum} = {self._lanes("tl.sum", f"{total} * tl.exp({most} - {out_max}_safe)")}
            """
        )
        return out_max, out_sum


def _tl(value: Any) -> str:
    return triton_acc_type(value.dtype)
