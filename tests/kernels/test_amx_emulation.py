"""AMX's instructions one by one, of this CPU or emulated: what they mean, and what they refuse."""

import ctypes
import faulthandler
import mmap
import os
import signal

import amx_emulation
import numpy as np
import pytest
import torch
from amx_emulation import EMULATED, TILED

from gcu_compile.kernels.host import build
from gcu_compile.kernels.tolerance import tolerance

pytestmark = pytest.mark.usefixtures("amx")
needs_emulation = pytest.mark.skipif(EMULATED not in TILED, reason=f"not emulated: {amx_emulation.refusal()}")
TYPES = {"bf16": None, "ss": (np.int8, np.int8), "su": (np.int8, np.uint8), "us": (np.uint8, np.int8),
         "uu": (np.uint8, np.uint8)}  # fmt: skip
SHAPES = [(16, 16, 16), (1, 1, 1), (5, 3, 7), (16, 1, 16), (2, 16, 9), (15, 13, 16)]  # rows, words summed, columns


def instructions():
    return amx_emulation.library("instructions", "amx")


def config(**tiles):
    """What ldtilecfg reads: `t0=(rows, bytes)`."""
    made = np.zeros(64, np.uint8)
    made[0] = 1
    for name, (rows, line) in tiles.items():
        made[16:48].view(np.uint16)[int(name[1:])], made[48 + int(name[1:])] = line, rows
    return made


def at(array):
    return ctypes.c_void_p(array.ctypes.data)


def strided(array, pitch):
    return at(array), ctypes.c_int64(pitch)


def operands(kind, rows, words, columns, seed=0):
    """a [rows, bytes], b [words, bytes] and c [rows, columns], with room for more behind each row."""
    source = np.random.default_rng(seed)
    if kind == "bf16":
        a, b = (source.standard_normal((n, 40)).astype(np.float32).view(np.uint32) >> 16 for n in (rows, words))
        return a.astype(np.uint16), b.astype(np.uint16), source.standard_normal((rows, 20)).astype(np.float32)
    a, b = (source.integers(0, 256, (n, 80), np.uint8) for n in (rows, words))
    a[0], b[0] = 128, 255
    return a, b, source.integers(-(2**31), 2**31, (rows, 20), np.int32)


def product(kind, a, b, c, words, columns, run=None):
    """c of the product, and the configuration that it left."""
    found, kept = c.copy(), np.zeros(64, np.uint8)
    tiles = config(t0=(len(a), columns * 4), t1=(len(a), words * 4), t2=(words, columns * 4))
    more = [at(kept)] if run is None else []
    pairs = [*strided(a, a.strides[0]), *strided(b, b.strides[0]), *strided(found, c.strides[0])]
    (run or instructions().product)(at(tiles), list(TYPES).index(kind), *pairs, *more)
    assert run or np.array_equal(kept, tiles)
    return found


def floats(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pairs(a, b, words, columns):
    """The inputs as matrices in float64: [rows, inputs] and [inputs, columns]."""
    inner = b[:, : 2 * columns].reshape(words, columns, 2).transpose(0, 2, 1).reshape(2 * words, columns)
    return floats(a[:, : 2 * words]).astype(float), floats(inner).astype(float)


@pytest.mark.parametrize("rows,words,columns", SHAPES)
def test_products_of_bfloat16(rows, words, columns):
    a, b, c = operands("bf16", rows, words, columns)
    found = product("bf16", a, b, c, words, columns)
    x, y = pairs(a, b, words, columns)
    limit = 2.0**-22 * (np.abs(x) @ np.abs(y) + np.abs(c[:, :columns]))
    assert (np.abs(found[:, :columns] - (x @ y + c[:, :columns])) <= limit).all()
    assert np.array_equal(found[:, columns:], c[:, columns:])  # behind a row


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "bf16"])
@pytest.mark.parametrize("rows,words,columns", SHAPES)
def test_products_of_whole_numbers(kind, rows, words, columns):
    a, b, c = operands(kind, rows, words, columns)
    found = product(kind, a, b, c, words, columns)
    left, right = TYPES[kind]
    x = a[:, : 4 * words].view(left).astype(np.int64)
    y = b[:, : 4 * columns].view(right).reshape(words, columns, 4).transpose(0, 2, 1).reshape(4 * words, columns)
    expected = c.astype(np.int64)
    expected[:, :columns] += x @ y.astype(np.int64)
    assert np.array_equal(found, expected.astype(np.int32))  # the low 32 bits


@needs_emulation
def test_sums_of_bfloat16_are_rounded_in_the_order_of_the_manual():
    a, b, c = operands("bf16", 16, 16, 16)
    x, y = pairs(a, b, 16, 16)
    even, odd = (np.zeros((16, 16), np.float32) for _ in range(2))
    for k in range(16):  # products are exact in float64, and so are these sums: one rounding each
        even = (even + x[:, 2 * k, None] * y[None, 2 * k]).astype(np.float32)
        odd = (odd + x[:, 2 * k + 1, None] * y[None, 2 * k + 1]).astype(np.float32)
    assert np.array_equal(product("bf16", a, b, c, 16, 16)[:, :16], c[:, :16] + (even + odd))


def test_denormals_are_zeros_on_both_sides():
    one, small, half = 0x3F80, 0x0080, 0x3F00  # small: the least normal number, 2^-126
    for left, right, before, after in (
        (one, 0x007F, 0.0, 0.0),
        (small, half, 0.0, 0.0),
        (small, one, 0.0, 2.0**-126),
        (0, one, 2.0**-127, 0.0),
        (0x8080, one, 1.5 * 2.0**-126, 0.0),
    ):
        a, b = np.array([[left, 0]], np.uint16), np.array([[right, 0]], np.uint16)
        assert product("bf16", a, b, np.array([[before]], np.float32), 1, 1) == [[after]]


def test_what_is_not_finite_stays():
    for value, other, expected in ((0x7F80, 0x3F80, np.inf), (0x7F80, 0, np.nan), (0x7FC0, 0x3F80, np.nan)):
        a, b = np.array([[0x3F80, value]], np.uint16), np.array([[0x3F80, other]], np.uint16)
        assert np.array_equal(product("bf16", a, b, np.ones((1, 1), np.float32), 1, 1), [[expected]], equal_nan=True)


@pytest.mark.parametrize("rows,line", [(16, 64), (5, 7), (1, 1), (3, 63)])
@pytest.mark.parametrize("pitch", [64, 65, -64])
def test_only_what_is_configured_is_read_and_written(rows, line, pitch):
    page = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    memory = np.frombuffer(page, np.uint8)
    guarded = ctypes.c_void_p(memory.ctypes.data + mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(guarded, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    first = mmap.PAGESIZE - line - max(0, (rows - 1) * pitch)  # the last byte that is read is the last of the page
    memory[: mmap.PAGESIZE] = np.arange(mmap.PAGESIZE) * 7 % 251
    expected = np.full(4096, 255, np.uint8)
    found, start = expected.copy(), 2048
    for row in range(rows):
        expected[start + row * pitch :][:line] = memory[first + row * pitch :][:line]
    source, target = (ctypes.c_void_p(x.ctypes.data + offset) for x, offset in ((memory, first), (found, start)))
    instructions().copy(at(config(t3=(rows, line))), source, ctypes.c_int64(pitch), target)
    assert np.array_equal(found, expected)
    libc.mprotect(guarded, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE)


def test_addresses_of_every_form():
    source, found = np.arange(4096, dtype=np.uint32).view(np.uint8), np.zeros((6, 16, 64), np.uint8)
    instructions().addresses(at(config(**{f"t{t}": (16, 64) for t in range(6)})), at(source), at(found))
    lines = source.reshape(-1, 64)
    for tile, first in enumerate([0, 1, 16, 2, None, 5]):
        expected = lines[[4] * 16] if first is None else lines[first : first + 16]
        assert np.array_equal(found[tile], expected), tile


def test_registers_are_kept():
    assert instructions().registers(at(config(t0=(16, 64)))) == 0


def test_threads_have_tiles_of_their_own():
    source, found = np.arange(1024, dtype=np.uint8), np.zeros(1024, np.uint8)
    instructions().two_threads(at(config(t0=(16, 64))), at(source), at(found))
    assert np.array_equal(found, source)


GOOD = {f"t{t}": (16, 64) for t in range(3)}
FAULTS = [
    (0, GOOD, "tilezero: tmm3 is used, and no tiles are configured in this thread"),
    (1, GOOD, "tilezero: tmm7 is not configured"),
    (2, GOOD | {"t1": (16, 60)}, r"tdpbssd: tmm0 [16 rows of 64 bytes] += tmm1 [16 of 60] tmm2 [16 of 64]"),
    (2, GOOD | {"t1": (15, 64)}, r"tdpbssd: tmm0 [16 rows of 64 bytes] += tmm1 [15 of 64] tmm2 [16 of 64]"),
    (2, GOOD | {"t2": (16, 60)}, r"tdpbssd: tmm0 [16 rows of 64 bytes] += tmm1 [16 of 64] tmm2 [16 of 60]"),
    (3, GOOD, r"tdpbf16ps: tmm0 [16 rows of 64 bytes] += tmm1 [16 of 64] tmm1 [16 of 64]"),
    (4, GOOD, "tileloadd: tmm6 is not configured"),
    (5, GOOD, "tilestored: tmm5 is not configured"),
    (6, GOOD, "tilestored: tmm0 is used, and no tiles are configured in this thread"),
    (7, {"t1": (17, 64)}, "ldtilecfg: tmm1 cannot have 17 rows of 64 bytes"),
    (7, {"t1": (0, 64)}, "ldtilecfg: tmm1 cannot have 0 rows of 64 bytes"),
    (7, {"t9": (1, 4)}, "ldtilecfg: palette 1 has no tmm9"),
]


def ends(call):
    """The signal by which a process ends that makes this call, and what the emulation said."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        faulthandler.enable(os.open(os.devnull, os.O_WRONLY))
        with amx_emulation.emulated(write):
            call()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        return os.WTERMSIG(os.waitpid(child, 0)[1]), said.read()


@needs_emulation
@pytest.mark.parametrize("which,tiles,message", FAULTS, ids=range(len(FAULTS)))
def test_what_a_cpu_would_refuse_ends_the_process_with_a_reason(which, tiles, message):
    fault, given = instructions().fault, config(**tiles)
    assert ends(lambda: fault(at(given), which)) == (signal.SIGABRT, f"AMX emulation: {message}\n")


@needs_emulation
def test_the_emulation_ends(monkeypatch):
    """An instruction is illegal again, builds for AMX are refused again, and none that was loaded is found."""
    fault, trap = instructions().fault, amx_emulation.library("trap", "avx512")
    inside = build.load("int8_gemm")
    assert "-amx-" in inside._name
    assert ends(lambda: (trap.amx_end(2), trap.amx_end(2), fault(at(config(**GOOD)), 0))) == (signal.SIGILL, "")
    with amx_emulation.emulated():
        assert "amx" in build.available()
    assert build._load_for.cache_info().currsize == build._load.cache_info().currsize == 0


@needs_emulation
def test_an_illegal_instruction_of_another_kind_stays_one():
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x0f\x0b\xc3")  # ud2; ret
    call = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    assert ends(call) == (signal.SIGILL, "")


@pytest.mark.skipif(TILED != ("amx",), reason="this CPU has no AMX to compare with, or host_isa is another")
@pytest.mark.parametrize("kind", TYPES)
def test_the_emulation_does_what_this_cpu_does(kind):
    """To the bit, but for bfloat16: kernels are not to depend on the order in which a CPU sums."""
    emulation = amx_emulation.library("trap", "avx512").amx_product
    for seed, (rows, words, columns) in enumerate(SHAPES):
        a, b, c = operands(kind, rows, words, columns, seed)
        given = (kind, a, b, c, words, columns)
        emulated, here = product(*given, run=emulation), product(*given)
        if kind == "bf16":
            np.testing.assert_allclose(emulated, here, **tolerance(torch.float32, 2 * words, scale=np.sqrt(2 * words)))
        else:
            assert np.array_equal(emulated, here)
