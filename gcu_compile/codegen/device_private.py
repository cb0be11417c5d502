"""Every touch of private torch for the device type: its name, Dynamo's interface, Inductor's registrations."""

from __future__ import annotations

import functools
import hashlib
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device
from torch._inductor import scheduler as inductor_scheduler
from torch._inductor import utils as inductor_utils
from torch._inductor.codecache import CacheBase
from torch._inductor.codegen.common import (
    DeviceOpOverrides,
    get_scheduling_for_device,
    init_backend_registration,
    register_backend_for_device,
    register_device_op_overrides,
)
from torch._inductor.runtime.hints import DeviceProperties

# Options of Inductor that are known to break on this device, or that need a device at compile time.
# Sources: torch-gcu's Inductor port; vllm-plugin-FL issue #557, compilation/gcu_compiler.py; Torch-FL inductor_backend.
FORCED = {
    "combo_kernels": False,  # NameError: xloop
    "triton.autotune_at_compile_time": False,
    "compile_threads": 1,  # pointers are per device: a kernel compiled in a worker hangs
    "_use_fp64_for_unbacked_floats": False,
    "use_joint_graph_passes": False,  # folds constants, and traces its patterns, on the device
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
    "triton.cudagraphs": False,
    "triton.multi_kernel": 0,
    "triton.native_matmul": False,
    "triton.mix_order_reduction": False,
    "triton.cooperative_reductions": False,
    "fallback_random": True,
    "split_reductions": False,  # the second pass indexes with div and mod
    "assert_indirect_indexing": False,
    "cpp_wrapper": False,
}


def name_device(name: str, module: Any) -> None:
    """Name the private device type, and give it Python guards: FakeTensors can then live on it."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(name, backend_module=module)


def forced_options() -> dict[str, Any]:
    """`FORCED`, without those that this version of torch does not know."""
    from torch._inductor import config

    return {name: value for name, value in FORCED.items() if _known(config, name)}


def _known(config: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def install(name: str, runtime: Any) -> str:
    """Register the device with Dynamo and Inductor.

    Returns: the class that somebody else had registered as Inductor's scheduling; "" if none, or if it was ours.
    """
    from gcu_compile.codegen.scheduling_private import GcuScheduling, GcuWrapper

    init_backend_registration()
    rival = get_scheduling_for_device(name)
    interface = _interface(runtime)
    for spelled in (name, *(f"{name}:{index}" for index in range(max(1, runtime.module.device_count())))):
        register_interface_for_device(spelled, interface)
    DeviceProperties.create.cache_clear()
    register_backend_for_device(name, GcuScheduling, GcuWrapper)
    register_device_op_overrides(name, _Launch(runtime))
    if name not in inductor_utils.GPU_TYPES:
        # What is in this list gets device guards and GPU fusion limits.
        inductor_utils.GPU_TYPES.append(name)
        # The scheduler refuses devices of that list unless CUDA, XPU or MTIA brought Triton.
        inductor_scheduler.has_triton = lambda: True
    _triton_driver(runtime)
    if runtime.kind == "card":
        _cache_system(runtime)
    ours = rival is None or getattr(rival, "__module__", "").startswith("gcu_compile")
    return "" if ours else f"{rival.__module__}.{rival.__qualname__}"


def _interface(runtime: Any) -> type[DeviceInterface]:
    """Dynamo's view of the device: the runtime's module, and the profile for what that does not know."""
    module, profile = runtime.module, runtime.profile
    properties = SimpleNamespace(
        name=runtime.target,
        major=profile.value("device_capability") // 10,
        minor=0,
        multi_processor_count=profile.value("sip_count"),
        total_memory=profile.value("dram_bytes"),
        warp_size=profile.value("warp_size"),
        max_threads_per_multi_processor=profile.value("max_warps"),
        max_threads_per_block=profile.value("max_warps"),
        regs_per_multiprocessor=None,
    )

    class GcuInterface(DeviceInterface):
        """Delegates to `torch.gcu`."""

        Event = getattr(module, "Event", torch.Event)
        Stream = getattr(module, "Stream", torch.Stream)
        device = getattr(module, "device", DeviceInterface.device)

        class Worker:
            """Compilation is in the process itself, so that this is the interface again."""

            @staticmethod
            def set_device(index: int) -> None:
                module.set_device(index)

            @staticmethod
            def current_device() -> int:
                return module.current_device()

            @staticmethod
            def get_device_properties(device: Any = None) -> Any:
                return properties

        current_device = staticmethod(lambda: module.current_device())
        device_count = staticmethod(lambda: module.device_count())
        is_available = staticmethod(lambda: module.is_available())
        synchronize = staticmethod(lambda device=None: module.synchronize(device))
        is_bf16_supported = staticmethod(lambda including_emulation=False: "bf16" in profile.value("dtypes"))
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

        @staticmethod
        def set_device(device: Any) -> None:
            module.set_device(device)

        @staticmethod
        def current_stream() -> Any:
            return module.current_stream()

        @staticmethod
        def set_stream(stream: Any) -> None:
            module.set_stream(stream)

        @staticmethod
        def stream(stream: Any) -> Any:
            return module.stream(stream)

        @staticmethod
        def exchange_device(index: int) -> int:
            before = module.current_device()
            if index >= 0 and index != before:
                module.set_device(index)
            return before

        maybe_exchange_device = exchange_device

        @staticmethod
        def get_raw_stream(index: int) -> int:
            from gcu_compile.codegen.runtime import get_raw_stream

            return get_raw_stream(index)

        @staticmethod
        def get_compute_capability(device: Any = None) -> str:
            return runtime.target

        @staticmethod
        def is_dtype_supported(dtype: torch.dtype, including_emulation: bool = False) -> bool:
            return dtype not in (torch.float64, torch.complex128)

    return GcuInterface


class _Launch(DeviceOpOverrides):
    """Lines of the generated wrapper; all of them go through `gcu_compile.codegen.runtime`."""

    def __init__(self, runtime: Any):
        self.runtime = runtime

    def import_get_raw_stream_as(self, name: str) -> str:
        line = f"from gcu_compile.codegen.runtime import get_raw_stream as {name}"
        return f"import triton_gcu.triton\n{line}" if self.runtime.packaging == "triton_gcu" else line

    def set_device(self, device_idx: int) -> str:
        return f"gcu_runtime.set_device({device_idx})"

    def synchronize(self) -> str:
        return "gcu_runtime.synchronize()"

    def device_guard(self, device_idx: int) -> str:
        return f"gcu_runtime.device_guard({device_idx})"

    def current_stream(self) -> str:
        return "torch.gcu.current_stream()"


class _NoDriver:
    """An active Triton driver for a machine that has none: Inductor asks it for a target and hashes the answer.

    The target is the one whose front end makes our TTIR (`targets/triton_private.py`).
    """

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        from gcu_compile.targets.triton_private import FRONT_END

        return GPUTarget(*FRONT_END)

    def get_current_device(self) -> int:
        return 0

    @staticmethod
    def is_active() -> bool:
        return True


def _triton_driver(runtime: Any) -> None:
    """Without a card Triton has no driver; with one, the vendor's packaging brings its own."""
    if runtime.kind == "card":
        return
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception:
        driver.set_active(_NoDriver())


def _cache_system(runtime: Any) -> None:
    """Inductor's key of the system asks for `gcnArchName`, which a GCU's properties lack."""

    @functools.cache
    def get_system() -> dict[str, Any]:
        from gcu_compile.torch_private import triton_version

        version = {"triton": triton_version(), "packaging": runtime.packaging}
        device = {"name": runtime.profile.value("triton_arch")}
        text = repr((sorted(version.items()), device))
        return {"device": device, "version": version, "hash": hashlib.sha256(text.encode()).hexdigest()}

    CacheBase.get_system = staticmethod(get_system)
