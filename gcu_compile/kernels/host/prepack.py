"""Weights in the layout of the host kernels: repacked once, kept for as long as the original lives.

A graph whose weights are inputs hands the operation the tensors of the checkpoint, in the checkpoint's layout. The
first call repacks; later calls with the same tensor, not written since, find the copy. Where a tensor cannot be
followed (a view made anew in every call, or one without a version counter) nothing is kept, and the kernel refuses.
vLLM's layers repack while they load and do not come here.
"""

from __future__ import annotations

import weakref

import torch

from gcu_compile.kernels.dequant_gemm import layouts

NATIVE = {4: "host_int4", 8: "host_int8"}
# id of a tensor -> (weak reference to it, its version, layout, the copy)
_kept: dict[int, tuple[weakref.ref, int, str, torch.Tensor]] = {}


def refuses(weight: torch.Tensor, layout: str) -> str | None:
    """Why `weight` cannot be repacked once and for all, or None."""
    if layout in NATIVE.values():
        return None
    if weight._is_view():
        return f"the weight in layout {layout} is a view, which cannot be repacked once and kept"
    if weight.is_inference():
        return f"the weight in layout {layout} is an inference tensor, whose writes cannot be seen"
    return None


def native(weight: torch.Tensor, layout: str, n: int, k: int) -> torch.Tensor:
    """[n, k] codes of `weight` in the host's own layout of the same width."""
    form = layouts.get(layout)
    new = layouts.get(NATIVE[form.bits])
    if layout == new.name:
        return weight
    found = _kept.get(id(weight))
    if found is not None and found[0]() is weight and found[1:3] == (weight._version, layout):
        return found[3]
    copy = layouts.repack(weight.detach(), form, new, n, k)
    key = id(weight)
    _kept[key] = (weakref.ref(weight, lambda _: _kept.pop(key, None)), weight._version, layout, copy)
    return copy


def zeros_of(zeros: torch.Tensor | None, layout: str) -> torch.Tensor | None:
    """`zeros` in the range of the host layout's codes; repacking moved the codes by as much."""
    form = layouts.get(layout)
    offset = layouts.get(NATIVE[form.bits]).midpoint - form.midpoint
    return zeros if zeros is None or offset == 0 else zeros.to(torch.float32) + offset
