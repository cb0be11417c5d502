"""The instruction set that a test's kernels are built for."""

import contextlib

import amx_emulation
import pytest

from gcu_compile.options import resolve


@pytest.fixture
def use_isa(monkeypatch, request):
    """`use_isa(isa)`: kernels are built for it until the test ends. It is one of `build.available()`, or of
    `amx_emulation.ISAS`."""
    with contextlib.ExitStack() as stack:
        yield lambda isa: _use(isa, monkeypatch, stack, request.config)


@pytest.fixture(scope="module")
def amx(request):
    """Kernels are built for AMX in the whole of a module, which is skipped where that can in no way be."""
    if resolve().host_isa not in ("auto", "amx"):
        pytest.skip(f"option host_isa is {resolve().host_isa}, and this module is for AMX")
    if not amx_emulation.TILED:
        pytest.skip(amx_emulation.refusal())
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        _use(amx_emulation.TILED[0], patch, stack, request.config)
        yield


def _use(isa, patch, stack, config):
    if isa == amx_emulation.EMULATED:
        stack.enter_context(amx_emulation.emulated(amx_emulation.standard_error(config)))
        isa = "amx"
    patch.setenv("GCU_COMPILE_HOST_ISA", isa)
