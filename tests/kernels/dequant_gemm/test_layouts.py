"""Storage of weights: bit for bit what the formats define, and every layout its own inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.errors import InvalidInputError, UnknownNameError
from gcu_compile.kernels.dequant_gemm import layouts

NAMES = sorted(layouts.LAYOUTS)


def random_codes(layout, n, k, seed=0):
    low, high = layout.range
    return torch.randint(low, high + 1, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(NAMES), st.integers(1, 150), st.integers(1, 70), st.integers(0, 99))
def test_unpack_inverts_pack(name, n, k, seed):
    layout = layouts.get(name)
    codes = random_codes(layout, n, k, seed)
    stored = layouts.pack(codes, layout)
    assert tuple(stored.shape) == layout.shape(n, k) and stored.dtype == layout.word and stored.is_contiguous()
    assert stored.nbytes == layouts.bytes_of(layout, n, k)
    assert torch.equal(layouts.unpack(stored, layout, n, k), codes)


def test_gptq_is_as_autogptq_packs_it():
    """auto_gptq's qlinear `pack`: for every row of 32 / bits inputs, `qweight[row] |= weight[j] << bits * (j - i)`."""
    for bits in (4, 8):
        codes = random_codes(layouts.get(f"gptq_int{bits}"), 5, 64).numpy().astype(np.uint32)
        qweight = np.zeros((64 * bits // 32, 5), np.uint32)
        for k in range(64):
            qweight[k * bits // 32] |= codes[:, k] << np.uint32(bits * (k % (32 // bits)))
        stored = layouts.pack(torch.from_numpy(codes.astype(np.int64)), layouts.get(f"gptq_int{bits}"))
        assert np.array_equal(stored.numpy().view(np.uint32), qweight)


def test_awq_is_as_autoawq_packs_it():
    """AutoAWQ's WQLinear_GEMM: `order_map = [0, 2, 4, 6, 1, 3, 5, 7]`, `qweight[:, col] |= w[:, col * 8 + order_map[i]]
    << i * 4` on a weight [inputs, outputs]."""
    codes = random_codes(layouts.get("awq_int4"), 24, 7).numpy().astype(np.uint32).T
    qweight = np.zeros((7, 3), np.uint32)
    for column in range(3):
        for i, source in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            qweight[:, column] |= codes[:, column * 8 + source] << np.uint32(4 * i)
    stored = layouts.pack(torch.from_numpy(codes.T.astype(np.int64)), layouts.get("awq_int4"))
    assert np.array_equal(stored.numpy().view(np.uint32), qweight)


def test_compressed_tensors_is_as_its_own_packer_packs_it():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for bits, name in ((4, "int4_rows_i32"), (8, "int8_rows_i32")):
        codes = random_codes(layouts.get(name), 6, 64)
        signed = (codes - layouts.get(name).midpoint).to(torch.int8)
        assert torch.equal(pack_to_int32(signed, bits), layouts.pack(codes, layouts.get(name)))


def test_tiles_are_gptq_words_side_by_side():
    codes = random_codes(layouts.get("host_int4"), 128, 32)
    tiled, words = layouts.pack(codes, layouts.get("host_int4")), layouts.pack(codes, layouts.get("gptq_int4"))
    assert torch.equal(tiled[1], words[:, 64:])


SAME_WIDTH = [
    (old, new) for old in NAMES for new in ("host_int4", "host_int8") if layouts.get(old).bits == layouts.get(new).bits
]


@pytest.mark.parametrize(("old", "new"), SAME_WIDTH)
def test_repack_keeps_what_codes_stand_for(old, new):
    old, new = layouts.get(old), layouts.get(new)
    codes = random_codes(old, 70, 24)
    repacked = layouts.repack(layouts.pack(codes, old), old, new, 70, 24)
    assert torch.equal(layouts.unpack(repacked, new, 70, 24) - new.midpoint, codes - old.midpoint)
    assert torch.equal(repacked, layouts.pack(codes - old.midpoint + new.midpoint, new))  # what pads a tile too


@pytest.mark.parametrize(("old", "new"), SAME_WIDTH)
def test_repack_by_blocks_and_in_another_order_of_the_inputs(old, new, monkeypatch):
    monkeypatch.setattr(layouts, "CODES", 4000)  # 64 outputs of 32 inputs
    old, new, n = layouts.get(old), layouts.get(new), 3 * 64 + 24
    codes, order = random_codes(old, n, 32), torch.randperm(32)
    whole = layouts.pack(codes[:, order] - old.midpoint + new.midpoint, new)
    assert torch.equal(layouts.repack(layouts.pack(codes, old), old, new, n, 32, order), whole)
    assert torch.equal(layouts.pack_blocks(codes[:, order] - old.midpoint, new), whole)


def test_code_out_of_range_is_refused():
    with pytest.raises(InvalidInputError, match=r"gptq_int4: codes must be 0 .. 15"):
        layouts.pack(torch.tensor([[16]]), layouts.get("gptq_int4"))


def test_truncated_weight_is_refused_with_the_sizes():
    with pytest.raises(InvalidInputError, match=r"gptq_int4: a weight of 8 outputs and 64 inputs is \[8, 8\]"):
        layouts.unpack(torch.zeros(7, 8, dtype=torch.int32), layouts.get("gptq_int4"), 8, 64)


def test_unknown_layout_lists_the_known():
    with pytest.raises(UnknownNameError, match="Did you mean 'awq_int4'"):
        layouts.get("awq_int3")
