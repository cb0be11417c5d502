"""TTIR text becomes operations, values and lines; what is no TTIR is refused with its line."""

import pytest

pytest.importorskip("triton")
from gcu_compile.errors import InvalidInputError, KernelBuildError, UnknownNameError
from gcu_compile.targets.triton_private import compile_ttir
from gcu_compile.targets.ttir import parse
from gcu_compile.targets.ttir_types import attribute, parse_type, result_types, split_top

from .corpus import addresses, public, types


def module(specimen):
    return parse(compile_ttir(specimen.kernel, specimen.signature, specimen.constexprs))


@pytest.mark.parametrize("case", public.CASES, ids=[case[0].name for case in public.CASES])
def test_every_operand_is_a_value_that_knows_its_users(case):
    try:
        function = module(case[0]).function
    except KernelBuildError as error:
        pytest.skip(str(error))
    assert function.name == case[0].name
    ops = list(function.walk())
    for op in ops:
        assert op.name in op.text
        # Constants that were hoisted belong to no line.
        assert op.name == "arith.constant" or (op.location.file.endswith(".py") and op.location.line > 0)
        for operand in op.operands:
            assert op in operand.users
        for index, result in enumerate(op.results):
            assert result.op is op and result.index == index and result.type.text
    assert len(set(map(id, ops))) == len(ops)


def test_loops_have_their_bounds_and_carried_values():
    case = next(case for case in addresses.CASES if case.rule == "address-loop-carried")
    function = module(case.keeps).function
    loop = next(op for op in function.walk() if op.name == "scf.for")
    low, high, step, pointer = loop.operands
    assert high.name == "%n" and low.op.name == step.op.name == "arith.constant" and pointer.type.pointer
    body = loop.regions[0]
    assert [a.type.text for a in body.arguments] == ["i32", pointer.type.text]
    assert body.terminator.name == "scf.yield" and len(body.terminator.operands) == 1
    inside = next(op for op in body.walk() if op.name == "tt.load")
    assert loop in inside.ancestors()


def test_locations_are_those_of_the_users_source():
    function = module(types.CASES[0].keeps).function
    load = next(op for op in function.walk() if op.name == "tt.load")
    with open(load.location.file) as file:
        assert "tl.load" in file.read().splitlines()[load.location.line - 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no tt.func"),
        ("module {\n}\n", "no tt.func"),
        ("module {\n  tt.func public @k(%x: i32) {\n", "cut off"),
        ("module {\n  tt.func public @k(%x: i32) {\n    %y = arith.addi %x, %z : i32\n", "line 3 uses %z"),
        ("module {\n  tt.func public @k(%x: i32) {\n    what is this\n", "line 3 cannot be read"),
    ],
)
def test_what_is_no_ttir_is_refused_with_its_line(text, message):
    with pytest.raises(InvalidInputError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "element", "pointer", "bits"),
    [
        ("i32", (), "i32", False, 32),
        ("tensor<4x8xbf16>", (4, 8), "bf16", False, 16),
        ("!tt.ptr<f32>", (), "f32", True, 64),
        ("tensor<16x!tt.ptr<i8>>", (16,), "i8", True, 64),
        ("!tt.ptr<tensor<4x8xf16>>", (4, 8), "f16", True, 64),
        ("tensor<2xf8E5M2>", (2,), "f8E5M2", False, 8),
    ],
)
def test_types(text, shape, element, pointer, bits):
    kind = parse_type(text)
    assert (kind.shape, kind.element, kind.pointer, kind.bits) == (shape, element, pointer, bits)


def test_the_small_grammar():
    assert split_top('a, "x, y", tensor<4x8xi1>, (b, c)') == ["a", '"x, y"', "tensor<4x8xi1>", "(b, c)"]
    assert attribute("tt.reduce {axis = 1 : i32} x", "axis") == "1"
    assert attribute("tt.reduce {axis = 1 : i32} x", "order") is None
    kinds = result_types("tt.load", "tt.load %p, %m : tensor<64x!tt.ptr<f16>>")
    assert [kind.text for kind in kinds] == ["tensor<64xf16>"]


def test_a_wrong_specimen_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'BLOCK'"):
        compile_ttir(public.vector_add, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOK": 64})
    with pytest.raises(InvalidInputError, match="'n' of vector_add has no type"):
        compile_ttir(public.vector_add, {"x": "*fp32", "y": "*fp32", "out": "*fp32"}, {"BLOCK": 64})
    with pytest.raises(InvalidInputError, match="is not a @triton.jit function"):
        compile_ttir(len, {})
