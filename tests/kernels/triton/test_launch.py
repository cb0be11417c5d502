"""How kernels are launched: the interpreter in this process, other devices, and what cannot run."""

import subprocess
import sys

import pytest
import torch

from gcu_compile.errors import InvalidInputError, LegalityError, UnknownNameError
from gcu_compile.kernels.triton.configs import Config, configs
from gcu_compile.kernels.triton.launch import launch, target_of

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from gcu_compile.targets.triton_private import Interpreted, compile_for_cuda, compile_ttir  # noqa: E402


@triton.jit
def total(x):
    return tl.sum(x, axis=0) + tl.max(x, axis=0)


@triton.jit
def reduce(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32) + tl.zeros([BLOCK], dtype=tl.float32)
    tl.store(y_ptr + tl.program_id(0), total(x))


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def faulty(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), tl.arange(0, N * 2))


ONE = Config(tile={}, num_warps=4, num_stages=3, source="test")
SIGNATURE = {"x_ptr": "*bf16", "y_ptr": "*fp32", "n": "i32"}


def test_interpreter_and_compilers_take_turns_in_one_process():
    """What the interpreter patches is restored, helpers and Triton's own functions come along."""
    x = torch.arange(8.0).bfloat16()
    for _ in range(2):
        y = torch.zeros(2)
        launch(reduce, (2,), ONE, x, y, 8, BLOCK=4)
        assert y.tolist() == [9.0, 29.0]
        assert "tt.reduce" in compile_ttir(reduce, SIGNATURE, {"BLOCK": 64})
        assert compile_for_cuda(reduce, SIGNATURE, {"BLOCK": 64})["cubin"]
        with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
            total(x)


def test_what_is_patched_is_restored_after_an_error():
    with pytest.raises(Exception, match="shape"):
        Interpreted(faulty)[(1,)](torch.zeros(8, dtype=torch.int32), 4)
    assert "tt.reduce" in compile_ttir(reduce, SIGNATURE, {"BLOCK": 64})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_dot_of_every_dtype(dtype):
    a = (torch.arange(256).view(16, 16) % 7 - 3).to(dtype)
    c = torch.zeros(16, 16, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    Interpreted(matmul)[(1,)](a, a, c, 16)
    assert torch.equal(c.double(), a.double() @ a.double())


def test_what_is_no_kernel_is_refused():
    with pytest.raises(InvalidInputError, match="not a @triton.jit function"):
        Interpreted(lambda x: x)
    with pytest.raises(InvalidInputError, match="not a @triton.jit function"):
        compile_for_cuda(len, {})


def test_grid_beyond_the_card(monkeypatch):
    monkeypatch.setenv("GCU_COMPILE_TARGET", "gcu400")
    x = torch.zeros(4)
    assert target_of(x) == "gcu400"
    with pytest.raises(LegalityError, match="256 programs in y; gcu400 takes at most 255"):
        launch(reduce, (1, 256), ONE, x, x, 4, BLOCK=4)


def test_unknown_configurations_list_the_known():
    with pytest.raises(UnknownNameError, match="Did you mean 'sample'"):
        configs("sampel", "cuda")
    with pytest.raises(UnknownNameError, match="gcu300, gcu400"):
        configs("sample", "gcu500")


def test_operations_can_be_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, gcu_compile.kernels.sampling as s\n"
        "from gcu_compile.kernels.triton import sample\n"
        "print(sample.refuses(torch.zeros(1, 3)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "Triton is not installed", run.stderr
