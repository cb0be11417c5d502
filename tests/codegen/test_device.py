"""The device type: registered once, with or without torch_gcu, and ours wins over the vendor's port of Inductor."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gcu_compile.codegen import device
from gcu_compile.errors import TargetUnavailableError

ROOT = Path(__file__).parent.parent.parent
FAKE_VENDOR = """
import os, sys, types
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

class Gcu:
    def is_available(self): return True
    def is_initialized(self): return True
    def device_count(self): return 2
    def current_device(self): return 0
    def _is_in_bad_fork(self): return False
    def set_device(self, index): pass
    def manual_seed_all(self, seed): pass
    def synchronize(self, device=None): pass

_setup_privateuseone_for_python_backend("gcu", backend_module=Gcu())
if os.environ.get("TORCHGCU_INDUCTOR_ENABLE") == "1":
    from torch._inductor.codegen.common import register_backend_for_device
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    class VendorScheduling(TritonScheduling):
        pass

    register_backend_for_device("gcu", VendorScheduling, PythonWrapperCodegen)
"""


def run(code, path="", **environ):
    """Run `code` in a process of its own: the private device type can be named only once."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path), str(ROOT)])), **environ}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def vendor(tmp_path):
    """A folder with a package that calls itself torch_gcu."""
    (tmp_path / "torch_gcu").mkdir()
    (tmp_path / "torch_gcu" / "__init__.py").write_text(FAKE_VENDOR)
    return tmp_path


def test_without_torch_gcu_faketensors_live_on_the_device_and_nothing_runs():
    run("""
        import torch
        from torch._subclasses import FakeTensorMode
        from gcu_compile.codegen import device, runtime
        from gcu_compile.errors import TargetUnavailableError

        first = device.register("gcu300")
        assert first.kind == "fake" and first.packaging == ""
        with FakeTensorMode():
            x = torch.empty(4, 8, device="gcu", dtype=torch.bfloat16)
            assert (x @ x.t()).device == torch.device("gcu:0")
        assert not torch.gcu.is_available()
        try:
            runtime.get_raw_stream(0)
        except TargetUnavailableError as error:
            assert "GCU_COMPILE_EMULATE" in str(error)
        else:
            raise AssertionError("a stream of a device that is not there")
    """)


def test_registering_twice_is_harmless_and_may_change_the_target_but_not_the_kind():
    run("""
        from torch._dynamo.device_interface import get_interface_for_device
        from torch._inductor.codegen.common import get_scheduling_for_device
        from gcu_compile.codegen import device

        device.register("gcu300")
        device.register("gcu300")
        assert get_interface_for_device("gcu:0").get_compute_capability() == "gcu300"
        assert device.register("gcu400").target == "gcu400"
        assert get_interface_for_device("gcu").get_compute_capability() == "gcu400"
        assert get_interface_for_device("gcu").get_device_properties().multi_processor_count == 24
        assert get_scheduling_for_device("gcu").__module__.startswith("gcu_compile.")

        from gcu_compile.errors import TargetUnavailableError, UnknownNameError

        for wrong in ("gcu30", "host"):
            try:
                device.register(wrong)
            except UnknownNameError as caught:
                assert "gcu300" in str(caught)
            else:
                raise AssertionError(wrong)
        try:
            device.adopt(device.Runtime("emulated", "gcu300", device.current().module))
        except TargetUnavailableError as caught:
            assert "new process" in str(caught)
        else:
            raise AssertionError("two kinds of runtime in one process")
    """)


def test_options_that_break_on_the_device_are_forced():
    import torch._inductor.config as config

    from gcu_compile.codegen.device_private import forced_options

    forced = forced_options()
    assert forced["combo_kernels"] is False and forced["compile_threads"] == 1
    assert forced["triton.autotune_at_compile_time"] is False and forced["_use_fp64_for_unbacked_floats"] is False
    with config.patch(forced):
        assert config.fallback_random and not config.split_reductions


def test_a_private_device_of_somebody_else_is_left_alone():
    run("""
        import torch
        from gcu_compile.codegen import device
        from gcu_compile.errors import TargetUnavailableError

        torch.utils.rename_privateuse1_backend("npu")
        try:
            device.register("gcu300")
        except TargetUnavailableError as error:
            assert "npu" in str(error)
        else:
            raise AssertionError("renamed somebody else's device")
    """)


def test_with_torch_gcu_its_runtime_is_used_and_its_inductor_port_kept_out(vendor):
    run(
        """
        import os, torch
        from torch._inductor.codecache import CacheBase
        from torch._dynamo.device_interface import get_interface_for_device
        from gcu_compile.codegen import device

        runtime = device.register("gcu300")
        assert runtime.kind == "card" and runtime.module is torch.gcu and torch.gcu.device_count() == 2
        assert os.environ["TORCHGCU_INDUCTOR_ENABLE"] == "0"
        # One interface per card, and a key of the system that asks the card for nothing.
        assert get_interface_for_device("gcu:1").current_device() == 0
        assert CacheBase.get_system()["device"] == {"name": "gcu300"}
        """,
        vendor,
    )


def test_ours_wins_over_the_vendors_registration_and_says_so(vendor):
    result = run(
        """
        import logging
        logging.basicConfig()
        from torch._inductor.codegen.common import get_scheduling_for_device
        from gcu_compile.codegen import device

        device.register("gcu300")
        assert get_scheduling_for_device("gcu").__name__ == "GcuScheduling"
        """,
        vendor,
        TORCHGCU_INDUCTOR_ENABLE="1",
    )
    assert "replaces torch_gcu.VendorScheduling" in result.stderr


@pytest.mark.parametrize("package", ["triton_gcu", "flagtree"])
def test_the_triton_packaging_is_detected(vendor, package):
    code = """
        import triton.backends
        triton.backends.__path__.append(r"{folder}")
        from gcu_compile.codegen import device
        assert device.register("gcu300").packaging == "{package}"
        assert ("import triton_gcu.triton" in __import__("torch")._inductor.codegen.common.get_device_op_overrides(
            "gcu").import_get_raw_stream_as("f")) == ("{package}" == "triton_gcu")
    """
    folder = "triton_gcu" if package == "triton_gcu" else "enflame"
    (vendor / folder).mkdir()
    (vendor / folder / "__init__.py").write_text("")
    run(code.format(folder=vendor, package=package), vendor)


def test_two_triton_packagings_are_an_error(monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda module: object())
    with pytest.raises(TargetUnavailableError, match="triton_gcu and flagtree"):
        device.triton_packaging()


def test_a_broken_torch_gcu_is_named(tmp_path):
    (tmp_path / "torch_gcu").mkdir()
    (tmp_path / "torch_gcu" / "__init__.py").write_text("raise ImportError('libtopsrt.so: no such file')")
    run(
        """
        from gcu_compile.codegen import device
        from gcu_compile.errors import TargetUnavailableError
        try:
            device.register("gcu300")
        except TargetUnavailableError as error:
            assert "libtopsrt.so" in str(error)
        else:
            raise AssertionError("imported")
        """,
        tmp_path,
    )
