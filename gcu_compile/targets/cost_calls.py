"""How long would one call of the vendor's library take? From the shapes of its tensors: bytes, products, one launch.

A call is assumed to reach the profile's bandwidth and dot rate, whichever takes longer: a lower bound, since nothing
about the library's tiling is public.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from gcu_compile.targets.cost import Cost
from gcu_compile.targets.profile import Profile

# (shape, bytes of one element, Triton's name of the element type)
Tensor = tuple[tuple[int, ...], float, str]
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm", "dequant_gemm", "int8_gemm", "linear")
GROUPED = ("_grouped_mm", "grouped_mm", "dequant_gemm_grouped", "int8_gemm_grouped")
ATTENTION = ("attention", "paged_attention", "mla_attention")
# No work on the device: another view of the same memory.
VIEWS = ("view_as_complex", "view_as_real", "unsqueeze", "squeeze", "slice", "view", "as_strided", "expand", "permute")


def is_view(target: str) -> bool:
    """Whether a call only makes another view."""
    return _name(target) in VIEWS


def predict_call(
    target: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], profile: Profile, launches: int = 1
) -> Cost:
    """Predict the time of `launches` calls of `target`, e.g. "extern_kernels.mm".

    Args:
        inputs, outputs: its tensors, in the order of its arguments.
    """
    name = _name(target)
    read = sum(prod(shape) * size for shape, size, _ in inputs)
    if name in GROUPED and len(inputs) > 1:
        # Of a stack of experts' weights, those that some row was sent to.
        rows, (stack, size, _) = prod(inputs[0][0][:-1]), inputs[1]
        read -= prod(stack) * size * (1 - min(1.0, rows / stack[0]))
    written = sum(prod(shape) * size for shape, size, _ in outputs[:1])
    work = _products(name, inputs, outputs)
    element = inputs[0][2] if inputs else "f32"
    rates = profile.value("dot_rate")
    rate = rates.get(element, min(rates.values()))
    idle = is_view(target)
    times = {
        "launch": 0.0 if idle else float(launches * profile.value("launch_cost")),
        "dram": 0.0 if idle else launches * (read + written) / (profile.value("dram_bandwidth") * 1e3),
        "dma": 0.0,
        "dot": launches * work / (rate * 1e6),
        "vector": 0.0,
    }
    moved = (0, 0) if idle else (round(read * launches), round(written * launches))
    sips = profile.value("sip_count")
    return Cost(*moved, work * launches, 0, 0, 0, 0 if idle else launches, sips, times)


def _name(target: str) -> str:
    """`mm` of "extern_kernels.mm", "aten.mm.default" or "gcu.mm.default"."""
    parts = [part for part in target.split(".") if part not in ("default", "out", "Tensor", "int", "dim")]
    return parts[-1] if parts else target


def _products(name: str, inputs: Sequence[Tensor], outputs: Sequence[Any]) -> int:
    """Multiplications and additions."""
    if name in ATTENTION and len(inputs) > 1:
        query, keys = inputs[0][0], inputs[1][0]
        return 4 * prod(query) * (keys[-2] if len(keys) > 1 else 1)
    if name not in (*PRODUCTS, *GROUPED) or len(inputs) < 2 or not outputs:
        return 0
    left = inputs[0] if name in ("dequant_gemm", "int8_gemm", "linear", *GROUPED) else inputs[-2]
    return 2 * prod(outputs[0][0]) * left[0][-1]
