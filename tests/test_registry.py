"""How a fused operation finds its implementation, and what it says when it finds none."""

import logging

import pytest
import torch

from gcu_compile.errors import UnknownNameError
from gcu_compile.kernels import registry
from gcu_compile.kernels.tolerance import TABLE, tolerance


@pytest.fixture(scope="module")
def double():
    """An operation with one kernel, which takes only float32."""
    name = "test_double"
    if name in registry.OPS:
        return registry.OPS[name]
    kernel = registry.Implementation(
        "kernel", ("cpu",), lambda x: x * 2, lambda x: None if x.dtype == torch.float32 else f"{x.dtype} not float32"
    )
    return registry.register(
        registry.FusedOp(name, "(Tensor x) -> Tensor", lambda x: x + x, torch.empty_like, implementations=(kernel,))
    )


def test_kernel_runs_and_is_counted(double):
    before = registry.calls[double.name, "kernel"]
    assert torch.equal(torch.ops.gcu.test_double(torch.ones(2)), torch.full((2,), 2.0))
    assert registry.calls[double.name, "kernel"] == before + 1


def test_refusal_falls_back_with_its_reason_and_warns_once(double, caplog):
    registry.fallbacks.clear()
    with caplog.at_level(logging.WARNING, logger="gcu_compile"):
        for _ in range(3):
            assert torch.equal(torch.ops.gcu.test_double(torch.ones(2).half()), torch.full((2,), 2.0).half())
    assert registry.fallbacks == {(double.name, "kernel: torch.float16 not float32"): 3}
    assert sum("runs as plain torch" in record.message for record in caplog.records) == 1


def test_unknown_operation_lists_the_known(double):
    with pytest.raises(UnknownNameError, match="Did you mean 'test_double'"):
        registry.get("test_duble")


@pytest.mark.parametrize("dtype", TABLE)
def test_tolerance_grows_with_the_sum_only_as_its_root(dtype):
    one, many = tolerance(dtype, 1)["rtol"], tolerance(dtype, 10_000)["rtol"]
    assert one < many < 100 * one
    assert tolerance(dtype)["rtol"] >= torch.finfo(dtype).eps / 2


def test_tolerance_of_an_unknown_dtype():
    with pytest.raises(UnknownNameError, match="float8"):
        tolerance(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ("(Tensor x) -> Tensor", '(Tensor x, *, str site="") -> Tensor'),
        ("() -> Tensor", '(*, str site="") -> Tensor'),
        ("(Tensor(a!) x, *, float eps=1e-5) -> ()", '(Tensor(a!) x, *, float eps=1e-5, str site="") -> ()'),
        ("(Tensor x, int? s=None) -> (Tensor, Tensor)", '(Tensor x, int? s=None, *, str site="") -> (Tensor, Tensor)'),
    ],
)
def test_every_operation_can_carry_its_site(schema, expected):
    assert registry.with_site(schema) == expected


def test_watcher_sees_every_call_and_its_site(double, monkeypatch):
    seen = []

    def watcher(op, implementation, run, site, args, kwargs):
        seen.append((op.name, implementation, site))
        return run(*args, **kwargs)

    monkeypatch.setattr(registry, "watcher", watcher)
    torch.ops.gcu.test_double(torch.ones(2))
    torch.ops.gcu.test_double(torch.ones(2).half(), site="layers.3")
    assert seen == [(double.name, "kernel", ""), (double.name, "eager", "layers.3")]
