"""Tiling: what is tiled, what is walked, and that limits hold for every shape."""

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.codegen.tiling import TILE, Pattern, pointwise, pow2, reduction
from gcu_compile.targets.profile import load_profile

S60 = load_profile("gcu300")
SIPS = S60.value("sip_count")
MOST = S60.value("inductor_block_max")


def contiguous(sizes):
    strides = [prod(sizes[d + 1 :]) for d in range(len(sizes))]
    return Pattern(tuple(strides)), Pattern(tuple(strides), store=True)


def test_a_contiguous_kernel_is_tiled_in_three_dimensions():
    plan = pointwise([64, 32, 128], contiguous([64, 32, 128]), S60)
    assert {p: t.block for p, t in plan.trees.items()} == {"x": 128, "y": 32, "z": 8}
    assert plan.num_warps == 4 and plan.programs == SIPS // 4


def test_dimensions_beyond_three_are_walked():
    sizes = [5, 7, 64, 32, 128]
    plan = pointwise(sizes, contiguous(sizes), S60)
    assert plan.trees["z"].dims == (0, 1, 2) and plan.trees["y"].dims == (3,) and plan.trees["x"].dims == (4,)


def test_a_dimension_that_a_loaded_index_depends_on_is_walked():
    ids, rows = Pattern((1, 0), index=frozenset([0])), Pattern((0, 1))
    plan = pointwise([512, 4096], [ids, rows, Pattern((4096, 1), store=True)], S60)
    assert plan.trees["y"].block == 1 and plan.trees["x"].block == 4096


def test_a_transposed_access_is_never_a_tile():
    plan = pointwise([64, 64], [Pattern((1, 64)), Pattern((64, 1), store=True)], S60)
    assert plan.trees["y"].block == 1 and plan.trees["x"].block == 64


def test_strides_that_do_not_divide_give_up_the_outer_dimension():
    plan = pointwise([16, 16, 64], [Pattern((1000, 96, 1)), Pattern((1024, 64, 1), store=True)], S60)
    assert plan.trees["z"].block == 1 and plan.trees["y"].block == 16


def test_a_compared_position_spans_one_tiled_dimension():
    compared = Pattern((0, 0), compared=frozenset([0, 1]))
    plan = pointwise([2, 32], [*contiguous([2, 32]), compared], S60)
    assert plan.trees["y"].block == 1


def test_a_row_that_fits_is_reduced_in_one_tile():
    plan = reduction([2048], [4096], contiguous([2048, 4096]), S60)
    assert plan.persistent and plan.trees["r0_"].block == 4096 and plan.trees["x"].block == 8


def test_one_row_is_a_scalar_output():
    plan = reduction([1], [4096], contiguous([1, 4096]), S60)
    assert plan.persistent and plan.trees["x"].block == 1 and plan.programs == 1


def test_a_long_row_is_reduced_in_a_loop():
    plan = reduction([2], [151936], contiguous([2, 151936]), S60)
    assert not plan.persistent and 1 < plan.trees["r0_"].block <= MOST["R0_"]


def test_a_strided_axis_is_added_up_one_row_at_a_time():
    """Never a persistent reduction over it at one or two outputs: wrong on the card (Torch-FL #187)."""
    plan = reduction([33], [50], [Pattern((1, 33)), Pattern((1, 0), store=True)], S60)
    assert not plan.persistent and plan.trees["r0_"].block == 1 and plan.trees["x"].block > 2


shapes = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(0, 4))
def test_limits_hold_for_every_shape(sizes, swapped):
    patterns = list(contiguous(sizes))
    # One access runs against the others.
    patterns.append(Pattern(tuple(reversed(patterns[0].strides))))
    plan = pointwise(sizes, patterns, S60)
    check(plan, plan.trees)
    assert sorted(d for tree in plan.trees.values() for d in tree.dims) == list(range(len(sizes)))
    if len(sizes) > 1:
        cut = 1 + swapped % (len(sizes) - 1)
        plan = reduction(sizes[:cut], sizes[cut:], patterns, S60)
        check(plan, {"x": plan.trees["x"]})
        block = plan.trees["r0_"].block
        assert block == pow2(block) and block <= MOST["R0_"]
        assert not plan.persistent or block >= prod(sizes[cut:])
        # A block of outputs beside a tiled reduced axis is no small tile over a strided axis.
        if sizes[-1] > 1 and sizes[cut - 1] > 1:
            assert block == 1 or not any(p.strides[cut - 1] == 1 and p.strides[-1] not in (0, 1) for p in patterns)


def check(plan, trees):
    blocks = [tree.block for tree in trees.values()]
    assert all(block == pow2(block) for block in blocks)
    assert prod(blocks) <= max(TILE, MOST["X"])
    assert all(tree.block <= MOST[prefix.upper()] for prefix, tree in trees.items())
    assert 1 <= plan.programs * plan.num_warps <= SIPS
    assert plan.num_warps in (1, 4)


@pytest.mark.parametrize("number, power", [(1, 1), (2, 2), (3, 4), (576, 1024), (4096, 4096)])
def test_pow2(number, power):
    assert pow2(number) == power
