"""`torch.ops.gcu.write_kv`: keys and values into a paged cache, without anything before."""

from __future__ import annotations

import torch

from gcu_compile.kernels import registry
from gcu_compile.kernels.attention import checks, rope, touched
from gcu_compile.kernels.attention.softmax import compute_dtype
from gcu_compile.kernels.host import rope as host
from gcu_compile.kernels.triton import rope_and_cache as triton
from gcu_compile.options import debug_checks

SCHEMA = (
    "(Tensor k, Tensor v, Tensor slot_mapping, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k_scale=None, "
    "Tensor? v_scale=None, Tensor? k_zero_point=None, Tensor? v_zero_point=None, Tensor(c!)? k_scale_cache=None, "
    "Tensor(d!)? v_scale_cache=None) -> ()"
)


def check(k, v, slot_mapping, k_cache, v_cache, k_scale=None, v_scale=None, k_zero_point=None, v_zero_point=None,
          k_scale_cache=None, v_scale_cache=None) -> None:  # fmt: skip
    """Raise `InvalidInputError` for shapes and dtypes that have no meaning. Reads no values."""
    op = "write_kv"
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        checks.cache(op, f"{name}_cache", cache)
        expected = (k.shape[0], cache.shape[1], cache.shape[3])
        if x.shape != expected or x.dtype not in checks.FLOATS or x.dtype != k.dtype:
            raise checks.invalid(op, name, f"{x.dtype} {tuple(x.shape)}", f"floats {expected}")
    if v_cache.shape[:3] != k_cache.shape[:3] or v_cache.dtype != k_cache.dtype:
        is_ = f"{v_cache.dtype} {tuple(v_cache.shape)}"
        raise checks.invalid(op, "v_cache", is_, f"{k_cache.dtype} {tuple(k_cache.shape[:3])} and any head size")
    if slot_mapping.shape != k.shape[:1] or slot_mapping.dtype != torch.int64:
        is_ = f"{slot_mapping.dtype} {tuple(slot_mapping.shape)}"
        raise checks.invalid(op, "slot_mapping", is_, f"int64 [{k.shape[0]}]")
    rope.sides(op, k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point, k_scale_cache, v_scale_cache)


def values(slot_mapping, k_cache) -> None:
    """Raise `InvalidInputError` for slots out of range. Copies them to the CPU."""
    checks.slot_values("write_kv", slot_mapping, k_cache.shape[0] * k_cache.shape[2])


def eager(k, v, slot_mapping, k_cache, v_cache, k_scale=None, v_scale=None, k_zero_point=None, v_zero_point=None,
          k_scale_cache=None, v_scale_cache=None) -> None:  # fmt: skip
    """Write `k` and `v` at their slots: what `rope_and_cache` does last.

    Args:
        k: [tokens, kv_heads, head_dim]; v: [tokens, kv_heads, v_dim]; floats of one dtype.
        the rest: as for `rope_and_cache`.

    Raises:
        InvalidInputError: shapes, dtypes or slots that have no meaning.
    """
    if checks.is_fake(k, k_cache):
        return
    check(k, v, slot_mapping, k_cache, v_cache, k_scale, v_scale, k_zero_point, v_zero_point, k_scale_cache,
          v_scale_cache)  # fmt: skip
    values(slot_mapping, k_cache)
    wide = compute_dtype(k.dtype)
    rope.write(k_cache, k.to(wide), slot_mapping, k_scale, k_zero_point, k_scale_cache)
    rope.write(v_cache, v.to(wide), slot_mapping, v_scale, v_zero_point, v_scale_cache)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads * size] with the values of a token adjacent."""
    return x.flatten(1) if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.reshape(x.shape[0], -1).contiguous()


def _refuses_host(k, v, slot_mapping, k_cache, *args, **kwargs) -> str | None:
    return host.refuses(k, k_cache)


def _run_host(k, v, slot_mapping, k_cache, v_cache, *args, **kwargs) -> None:
    check(k, v, slot_mapping, k_cache, v_cache, *args, **kwargs)
    if debug_checks():
        values(slot_mapping, k_cache)
    if not host.run_write(_rows(k), _rows(v), slot_mapping, k_cache, v_cache, *args, **kwargs):
        values(slot_mapping, k_cache)  # the kernel met a slot out of range: the check that names it


def _run_triton(k, v, slot_mapping, k_cache, *args, **kwargs) -> None:
    check(k, v, slot_mapping, k_cache, *args, **kwargs)
    if debug_checks():
        values(slot_mapping, k_cache)
    triton.write(k, v, slot_mapping, k_cache, *args, **kwargs)


HOST = registry.Implementation("host_cpp", ("cpu",), _run_host, _refuses_host)
TRITON = registry.Implementation("triton", ("cuda", "gcu"), _run_triton, triton.refuses_write)
OP = registry.register(
    registry.FusedOp(
        "write_kv",
        SCHEMA,
        eager,
        lambda *args, **kwargs: None,
        lambda *args, **kwargs: 1,
        (HOST, TRITON),
        touched.by_slots,
        code_steps=1,  # of an int8 cache
    )
)
