"""The emulated card refuses what a card would refuse, hang on, or compute wrongly, and says which rule that is."""

import pytest
import torch
import triton
import triton.language as tl
from emulated import on_card

from gcu_compile.errors import LegalityError
from gcu_compile.kernels.tolerance import tolerance


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < n) * 2, at < n)


@triton.jit
def clamped(x, y, BLOCK: tl.constexpr):
    at = tl.maximum(tl.arange(0, BLOCK) - 1, 0)
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + at))


@triton.jit
def row_sums(x, y, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    values = tl.load(x + row * COLUMNS + tl.arange(0, COLUMNS))
    tl.store(y + row, tl.sum(values, 0))


@triton.jit
def halved(x):
    return x / 2


@triton.jit
def calls_another(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, halved(tl.load(x + at)))


def launch(kernel, *args, grid=(1,), **options):
    from gcu_compile.targets.emulator.launch import launch as run

    run(kernel, grid, *args, **options)


def pair(size=256, dtype=torch.float32, device="gcu"):
    return torch.arange(size, device=device).to(dtype), torch.zeros(size, device=device, dtype=dtype)


@on_card
def test_a_legal_kernel_runs_on_the_cards_memory():
    x, y = pair(1000)
    launch(double, x, y, 1000, grid=(4,), BLOCK=256)
    assert torch.equal(y, x * 2)
    launch(calls_another, x, y, BLOCK=512)
    assert torch.equal(y[:512], x[:512] / 2) and torch.equal(y[512:], x[512:] * 2)


@on_card
def test_a_view_is_written_in_place():
    x, y = pair(1024)
    launch(double, x[256:512], y[512:], 256, BLOCK=256)
    assert torch.equal(y[512:768], x[256:512] * 2) and y[:512].count_nonzero() == 0


@on_card
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_64_bit_tensors_are_refused(dtype):
    with pytest.raises(LegalityError, match=r"no-64-bit-values: argument 'x' is a torch.\w+64 tensor.*Remedy: cast"):
        launch(double, *pair(dtype=dtype), 256, BLOCK=256)


@on_card
def test_64_bit_integers_are_refused():
    with pytest.raises(LegalityError, match="no-64-bit-values: argument 'n' is 4294967296"):
        launch(double, *pair(), 1 << 32, BLOCK=256)


@on_card("gcu400")
def test_gcu400_takes_64_bit_tensors():
    x, y = pair(dtype=torch.int64)
    launch(double, x, y, 256, BLOCK=256)
    assert torch.equal(y, x * 2)


@on_card
def test_the_wrong_current_device_is_refused():
    x, y = pair(device="gcu:1")
    with pytest.raises(LegalityError, match=r"while gcu:0 is current, with 'x' on gcu:1.*hangs.*torch.gcu.device\(1\)"):
        launch(double, x, y, 256, BLOCK=256)
    with torch.gcu.device(1):
        launch(double, x, y, 256, BLOCK=256)
    assert torch.equal(y, x * 2)


@on_card
def test_host_tensors_are_refused():
    with pytest.raises(LegalityError, match="'y' on cpu: a card cannot reach host memory"):
        launch(double, pair()[0], torch.zeros(256), 256, BLOCK=256)


@on_card
def test_grid_and_warps_are_limited():
    x, y = pair()
    with pytest.raises(LegalityError, match="rule grid: 70000 programs in x; at most 65535"):
        launch(double, x, y, 256, grid=(70000,), BLOCK=256)
    with pytest.raises(LegalityError, match="rule grid: 256 programs in y; at most 255"):
        launch(double, x, y, 256, grid=(1, 256), BLOCK=256)
    for warps in (3, 16):
        with pytest.raises(LegalityError, match=f"rule warps: num_warps {warps}"):
            launch(double, x, y, 256, BLOCK=256, num_warps=warps)


@on_card
def test_what_aborts_the_compiler_is_refused_with_its_line():
    with pytest.raises(LegalityError, match=r"clamped cannot run on gcu300: rule address-abort: .*_launch.py:\d+"):
        launch(clamped, *pair(), BLOCK=256)


@on_card
def test_the_l1_budget_holds():
    x = torch.randn(2, 1 << 19, device="gcu")
    y = torch.zeros(2, device="gcu")
    with pytest.raises(LegalityError, match="rule l1-bytes: at least 2097152 bytes of L1 per SIP; 1572352"):
        launch(row_sums, x, y, grid=(2,), num_warps=1, COLUMNS=1 << 19)
    launch(row_sums, x, y, grid=(2,), num_warps=4, COLUMNS=1 << 19)
    torch.testing.assert_close(
        y.cpu().double(), x.cpu().double().sum(1), **tolerance(torch.float32, 1 << 19, scale=1 << 10)
    )
