"""The cost model against counts made by hand."""

import pytest

pytest.importorskip("triton")
from gcu_compile.errors import UnknownNameError
from gcu_compile.targets.cost import BOUNDS, predict
from gcu_compile.targets.cost_calls import is_view, predict_call
from gcu_compile.targets.legality import ttir_of
from gcu_compile.targets.profile import load_profile
from gcu_compile.targets.ttir import parse

from .corpus import addresses, patterns, public
from .corpus.case import at

S60 = load_profile("gcu300")
LAUNCH, BANDWIDTH = S60.value("launch_cost"), S60.value("dram_bandwidth") * 1e3  # us, bytes per us


def cost(specimen, values=None, launches=1, profile=S60):
    return predict(parse(ttir_of(specimen, profile)), profile, specimen.launch, values, launches)


def test_a_vector_addition_moves_three_vectors():
    found = cost(at(public.vector_add, "*fp32 *fp32 *fp32 i32", grid=(256,), BLOCK=4096))
    assert found.bytes_read == 2 * 4 * 256 * 4096 and found.bytes_written == 4 * 256 * 4096
    assert found.slices == 3 * 256 and found.gathered == found.gathered_bytes == 0
    assert found.times["dram"] == pytest.approx(3 * 4 * 256 * 4096 / BANDWIDTH)
    assert found.vector_operations == 256 * 4096 and found.active_sips == 24


def test_a_small_launch_is_bound_by_the_launch():
    found = cost(at(public.vector_add, "*fp32 *fp32 *fp32 i32", BLOCK=256))
    assert found.bound == "launch" and found.microseconds >= LAUNCH
    assert found.active_sips == 4


def test_launches_multiply_everything():
    once, thrice = (cost(at(public.vector_add, "*fp32 *fp32 *fp32 i32", BLOCK=256), launches=n) for n in (1, 3))
    assert thrice.microseconds == pytest.approx(3 * once.microseconds)
    assert thrice.bytes_read == 3 * once.bytes_read


def test_a_product_counts_its_loop():
    specimen = at(public.matmul_masked, "*bf16 *bf16 *fp32 i32 i32 i32", grid=(8, 8), M=128, N=128, K=64)
    found = cost(specimen, {"k": 4096})
    assert found.dot_operations == 2 * 1024 * 1024 * 4096 and not found.unknown_loops
    assert found.times["dot"] == pytest.approx(found.dot_operations / (S60.value("dot_rate")["bf16"] * 1e6))
    # Without k the loop's length is unknown; it counts once and is named.
    guess = cost(specimen)
    assert guess.dot_operations == 2 * 1024 * 1024 * 64 and len(guess.unknown_loops) == 1


def test_a_gather_costs_by_element():
    found = cost(at(addresses.modulo_on_tensor, "*fp32 *fp32", B=64))
    assert found.gathered == 64 and found.gathered_bytes == 256 and found.slices == 1
    rows = 1 * S60.value("dma_row_cost") / 1e3
    expected = S60.value("dma_setup_cost") + rows + 64 * S60.value("gather_element_cost") / 1e3
    assert found.times["dma"] == pytest.approx(expected / 4)


def test_rows_of_a_tile_cost_one_run_each():
    few = cost(at(patterns.straight, "*fp32 *fp32", B=32))
    one = cost(at(public.vector_add, "*fp32 *fp32 *fp32 i32", BLOCK=1024))
    assert few.times["dma"] * 4 == pytest.approx(2 * (1.0 + 32 * 0.01))
    assert one.times["dma"] * 4 == pytest.approx(3 * (1.0 + 0.01))


def test_a_grid_stride_loop_counts_every_tile_once():
    found = cost(at(addresses.grid_stride, "*fp32 *fp32", grid=(6,), TILES=8, B=1024))
    assert found.bytes_read == found.bytes_written == 8 * 1024 * 4 and found.slices == 16


def test_an_unknown_argument_is_refused():
    with pytest.raises(UnknownNameError, match="argument of vector_add"):
        cost(at(public.vector_add, "*fp32 *fp32 *fp32 i32", BLOCK=256), {"m": 3})


def test_a_profile_override_moves_the_prediction(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("launch_cost: 5\n")
    specimen = at(public.vector_add, "*fp32 *fp32 *fp32 i32", BLOCK=256)
    assert cost(specimen).microseconds - cost(specimen, profile=load_profile("gcu300", str(file))).microseconds == 25


def test_a_library_call_is_its_bytes_or_its_products():
    weight = ((4096, 11008), 2, "bf16")
    row = predict_call("extern_kernels.mm", [((1, 4096), 2, "bf16"), weight], [((1, 11008), 2, "bf16")], S60)
    assert row.bytes_read == 2 * (4096 + 4096 * 11008) and row.bound == "dram"
    assert row.microseconds == pytest.approx(LAUNCH + (row.bytes_read + row.bytes_written) / BANDWIDTH)
    many = predict_call("extern_kernels.mm", [((2048, 4096), 2, "bf16"), weight], [((2048, 11008), 2, "bf16")], S60)
    assert many.dot_operations == 2 * 2048 * 4096 * 11008 and many.bound == "dot"


def test_of_a_stack_of_experts_those_are_read_that_rows_were_sent_to():
    experts = ((8, 4096, 14336), 2, "bf16")
    two = predict_call("extern_kernels._grouped_mm", [((2, 4096), 2, "bf16"), experts], [((2, 14336), 2, "bf16")], S60)
    assert two.bytes_read == 2 * (2 * 4096 + 2 * 4096 * 14336)
    all_of_them = predict_call(
        "extern_kernels._grouped_mm", [((512, 4096), 2, "bf16"), experts], [((512, 14336), 2, "bf16")], S60
    )
    assert all_of_them.bytes_read == 2 * (512 * 4096 + 8 * 4096 * 14336)


def test_four_bit_weights_move_a_quarter_of_the_bytes():
    x, scales = ((1, 4096), 2, "bf16"), ((32, 11008), 2, "bf16")
    inputs = [x, ((512, 11008), 4, "i32"), scales]
    packed = predict_call("gcu.dequant_gemm.default", inputs, [((1, 11008), 2, "bf16")], S60)
    assert packed.bytes_read == 2 * 4096 + 4 * 512 * 11008 + 2 * 32 * 11008
    assert packed.dot_operations == 2 * 4096 * 11008


def test_a_view_costs_nothing():
    assert is_view("aten.view_as_real.default") and not is_view("aten.copy_.default")
    view = predict_call("aten.unsqueeze.default", [((8, 8), 2, "bf16")], [((8, 1, 8), 2, "bf16")], S60)
    assert view.microseconds == 0 and view.launches == 0 and set(view.times) == set(BOUNDS)
