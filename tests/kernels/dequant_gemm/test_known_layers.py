"""Layers that were met before: what was found of them is used while it is true, and for nobody else."""

import gc
import threading

import pytest
import torch
from dequant_cases import FLOATS, assert_close, dequant_arguments, dequant_reference
from test_host_int8 import arguments as int8_arguments

from gcu_compile.errors import InvalidInputError, KernelBuildError
from gcu_compile.kernels import direct, registry
from gcu_compile.kernels.dequant_gemm import eager
from gcu_compile.kernels.host import dequant_gemm as host
from gcu_compile.kernels.host import int8_gemm as host_int8


def int4(seed=0, m=3, dtype=torch.bfloat16, **more):
    return dequant_arguments("host_int4", m, 70, 64, 2, dtype, torch.bfloat16, seed=seed, **more)


def int8(seed=0, m=3, dtype=torch.bfloat16, **more):
    return int8_arguments(m, 70, 64, dtype, seed=seed, **more)


KINDS = {"dequant_gemm": (int4, 64, host), "int8_gemm": (int8, 1, host_int8)}
each_kind = pytest.mark.parametrize("op", KINDS)


def meaning(op, given):
    return dequant_reference(**given) if op == "dequant_gemm" else eager.int8_gemm(**given).double()


def call(op, given):
    """The operation, checked against its meaning."""
    y = getattr(torch.ops.gcu, op).default(**given)
    assert_close(y, meaning(op, given), KINDS[op][1])
    return y


def known(op, given, monkeypatch):
    """Whether the call goes the short way; its result is checked."""
    seen = []

    def dispatch(op, *args, **kwargs):
        seen.append(op)
        return original(op, *args, **kwargs)

    original = registry.dispatch
    with monkeypatch.context() as patch:
        patch.setattr(registry, "dispatch", dispatch)
        call(op, given)
    return not seen


@each_kind
@pytest.mark.parametrize("more", [{}, {"zeros": True, "bias": True}])
def test_a_layer_is_looked_at_once_and_every_call_counted(op, more, monkeypatch):
    given = KINDS[op][0](**more)
    before = registry.calls[op, "host_cpp"]
    assert [known(op, given, monkeypatch) for _ in range(3)] == [False, True, True]
    assert registry.calls[op, "host_cpp"] == before + 3


@each_kind
def test_dtypes_and_rows_in_turn(op, monkeypatch):
    given = KINDS[op][0]()
    call(op, given)
    for dtype in FLOATS:
        for m in (1, 17, 0, 2):
            given["x"] = KINDS[op][0](m=m, dtype=dtype, seed=m)["x"]
            assert known(op, given, monkeypatch)
    wide = torch.randn(5, 100).bfloat16()
    assert known(op, {**given, "x": wide[:, 10:74]}, monkeypatch)
    for odd in (torch.randn(2, 3, 64), torch.randn(64, 5).T):
        assert not known(op, {**given, "x": odd}, monkeypatch)


def test_codes_scales_and_output_dtypes_in_turn(monkeypatch):
    given, codes = int8(), int8(dtype=torch.int8, x_zeros=True)
    call("int8_gemm", given)
    for out_dtype in (None, *FLOATS):
        for x in (given["x"], codes["x"]):
            with_scales = {"x_scales": codes["x_scales"], "x_zeros": codes["x_zeros"]} if x is codes["x"] else {}
            one = {**given, "x": x, **with_scales, "out_dtype": out_dtype}
            assert known("int8_gemm", one, monkeypatch)
    one_for_all = {**given, "x": codes["x"], "x_scales": torch.tensor([0.25])}
    assert not known("int8_gemm", one_for_all, monkeypatch)


@each_kind
def test_values_may_change(op, monkeypatch):
    given, other = KINDS[op][0](0), KINDS[op][0](1)
    call(op, given)
    for name in ("weight", "scales"):
        given[name].copy_(other[name])
        assert known(op, given, monkeypatch)


@each_kind
def test_a_tensor_that_moved_is_found_anew(op, monkeypatch):
    given, other = KINDS[op][0](0, bias=True), KINDS[op][0](1, bias=True)
    call(op, given)
    for name in ("weight", "scales", "bias"):
        given[name].data = other[name].data.clone()
        assert not known(op, given, monkeypatch)
        assert known(op, given, monkeypatch)
    given["scales"].data = given["scales"].data.to(torch.float16)  # as `module.half()` does
    assert not known(op, given, monkeypatch)


@each_kind
def test_a_tensor_that_was_replaced_is_found_anew(op, monkeypatch):
    given, other = KINDS[op][0](0, bias=True), KINDS[op][0](1, bias=True)
    call(op, given)
    for name in ("scales", "bias", "weight"):
        given[name] = other[name]
        assert not known(op, given, monkeypatch)
    given["bias"] = None
    assert not known(op, given, monkeypatch)


@each_kind
def test_a_form_that_changed_in_place_is_an_error(op):
    given = KINDS[op][0]()
    call(op, given)
    given["weight"].resize_(1, 8, 64)
    with pytest.raises(InvalidInputError, match="weight is"):
        call(op, given)


@each_kind
def test_a_shape_that_changed_in_place_is_an_error_though_the_numbers_stayed(op):
    given = KINDS[op][0](bias=True)
    call(op, given)
    for name, said in (("weight", "weight is"), ("scales", "scales are|groups do not|weight is"), ("bias", "bias is")):
        shape = given[name].shape
        given[name].data = given[name].data.view(2, -1) if name == "bias" else given[name].data.view(-1, 1)
        with pytest.raises(InvalidInputError, match=said):
            getattr(torch.ops.gcu, op).default(**given)
        given[name].data = given[name].data.view(shape)
        call(op, given)


@each_kind
@pytest.mark.parametrize("way", ["torch.ops", "direct"])
def test_a_library_that_can_no_longer_be_built_is_a_fallback_that_is_counted(op, way, monkeypatch):
    given = KINDS[op][0]()
    call(op, given)

    def load(name):
        raise KernelBuildError("no compiler any more")

    monkeypatch.setattr(KINDS[op][2].build, "load", load)
    monkeypatch.setattr(registry, "fallbacks", registry.fallbacks.copy())
    y = getattr(direct, op)(**given) if way == "direct" else getattr(torch.ops.gcu, op).default(**given)
    assert_close(y, meaning(op, given), KINDS[op][1])
    assert registry.fallbacks[op, "host_cpp: no compiler any more"] == 1


@each_kind
def test_a_view_that_negates_is_negated(op):
    given = KINDS[op][0]()
    given["x"] = torch._neg_view(given["x"])
    for _ in range(2):
        y = getattr(direct, op)(**given)
        assert_close(y, meaning(op, {**given, "x": given["x"].resolve_neg()}), KINDS[op][1])


@each_kind
def test_layers_share_nothing(op, monkeypatch):
    layers = [KINDS[op][0](seed) for seed in range(3)]
    layers.append({**layers[0], "weight": layers[1]["weight"].clone()})
    for given in layers:
        call(op, given)
    for given in (*layers, *reversed(layers)):
        assert known(op, given, monkeypatch)


@each_kind
def test_a_layer_is_forgotten_with_its_weight(op):
    gc.collect()
    before = len(KINDS[op][2]._layers._kept)
    for seed in range(20):  # their places in memory, and their numbers as objects, are used again
        given = KINDS[op][0](seed)
        call(op, given)
        call(op, given)
        del given
    gc.collect()
    assert len(KINDS[op][2]._layers._kept) == before


@each_kind
def test_what_is_wrong_is_still_said(op):
    given = KINDS[op][0]()
    call(op, given)
    function = getattr(torch.ops.gcu, op).default
    with pytest.raises(InvalidInputError, match="weight is"):
        function(**{**given, "x": torch.randn(2, 40)})
    with pytest.raises(InvalidInputError, match="x is torch.int32"):
        function(**{**given, "x": torch.ones(2, 64, dtype=torch.int32)})
    with pytest.raises(InvalidInputError, match="stores|expected 8"):
        function(**{**given, "layout": "host_int8" if op == "dequant_gemm" else "host_int4"})


def test_what_is_wrong_with_the_activations_is_still_said():
    given, codes = int8(), int8(dtype=torch.int8)
    call("int8_gemm", given)
    with pytest.raises(InvalidInputError, match="int8 codes need x_scales"):
        torch.ops.gcu.int8_gemm.default(**{**given, "x": codes["x"]})
    with pytest.raises(InvalidInputError, match="x_scales is"):
        torch.ops.gcu.int8_gemm.default(**{**given, "x": codes["x"], "x_scales": torch.ones(2, 1)})
    with pytest.raises(InvalidInputError, match="x_zeros need x_scales"):
        torch.ops.gcu.int8_gemm.default(**{**given, "x_zeros": torch.ones(3, 1, dtype=torch.int32)})


@each_kind
def test_the_shadow_check_sees_known_layers(op, monkeypatch):
    given, seen = KINDS[op][0](), []
    call(op, given)

    def watcher(op, implementation, run, site, args, kwargs):
        seen.append((op.name, implementation, site))
        return run(*args, **kwargs)

    monkeypatch.setattr(registry, "watcher", watcher)
    getattr(torch.ops.gcu, op).default(**given, site="here")
    getattr(direct, op)(**given, site="there")
    assert seen == [(op, "host_cpp", "here"), (op, "host_cpp", "there")]


@each_kind
@pytest.mark.parametrize("isa", ["portable", "auto"])
def test_a_known_layer_is_computed_with_the_instruction_set_that_is_asked_for(op, isa, monkeypatch):
    given, loaded = KINDS[op][0](), []
    call(op, given)
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    load = KINDS[op][2].build.load
    monkeypatch.setattr(KINDS[op][2].build, "load", lambda name: loaded.append(load(name)) or loaded[-1])
    call(op, given)
    assert f"-{isa if isa == 'portable' else ''}" in loaded[-1]._name


@each_kind
def test_threads(op):
    """Layers of their own and one of all, with rows of several numbers."""
    shared, wrong = KINDS[op][0](99), []

    def work(seed):
        mine = KINDS[op][0](seed, m=seed + 1)
        alone = getattr(torch.ops.gcu, op).default(**mine)
        together = getattr(torch.ops.gcu, op).default(**{**shared, "x": mine["x"]})
        for _ in range(50):
            if not torch.equal(getattr(torch.ops.gcu, op).default(**mine), alone):
                wrong.append(seed)
            if not torch.equal(getattr(direct, op)(**{**shared, "x": mine["x"]}), together):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_operations_without_a_short_way_have_no_direct_call():
    with pytest.raises(AttributeError, match="no operation 'quantize_per_token' with a short way"):
        direct.quantize_per_token  # noqa: B018
