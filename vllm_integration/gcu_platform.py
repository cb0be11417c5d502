"""The vLLM platform of a GCU: a card with torch_gcu, or the emulated one (option `emulate`).

vLLM's generic device code runs on it; nothing of vLLM's CPU platform does. See docs/gcu-bring-up.md.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from gcu_compile.backend import inductor_settings
from gcu_compile.errors import UnsupportedFeatureError
from gcu_compile.options import resolve
from gcu_compile.targets import emulator
from gcu_compile.targets.select import gcu_target
from vllm_integration import ATTENTION, ATTENTION_WRITTEN, behaviours, compilation, versions
from vllm_integration.quantization import cache as quantised_cache

KV_BLOCK_SIZE = 64
EMULATED = bool(resolve().emulate)
if EMULATED:
    emulator.start()
else:
    import torch_gcu  # noqa: F401  (makes torch.gcu)


def refuse_what_has_no_kernels(vllm_config: Any) -> None:
    """Raise for features whose work vLLM does in Triton kernels on 64-bit values, which a gcu300 does not take."""
    parallel = vllm_config.parallel_config
    for asked, name in (
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (vllm_config.lora_config is not None, "LoRA"),
    ):
        if asked:
            raise UnsupportedFeatureError(f"{name} is not available on target gcu. Leave it out, or use target host.")


class GcuPlatform(Platform):
    """`torch.device("gcu")` in vLLM.

    `is_cuda_alike` stays False, unlike in the vendor's plugin: where it is True vLLM calls CUDA operators by name.
    """

    _enum = PlatformEnum.OOT
    device_name = "gcu"
    device_type = "gcu"
    dispatch_key = "PrivateUse1"
    ray_device_key = "GPU"
    device_control_env_var = "TOPS_VISIBLE_DEVICES"
    dist_backend = "gloo" if EMULATED else "eccl"
    simple_compile_backend = "eager"
    supported_quantization = ["awq", "gptq", "compressed-tensors"]

    # What we compile with: as on target host.

    @classmethod
    def get_compile_backend(cls) -> str:
        return "vllm_integration.compiler.GcuCompiler"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return "vllm_integration.compiler.GcuPassManager"

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        behaviours.refuse_fork()
        if parser is not None:
            behaviours.extend_parser(parser)

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        cls.leave_graphs_out(vllm_config.compilation_config)
        compilation.apply_defaults(vllm_config.compilation_config, cls.get_compile_backend())

    @classmethod
    def leave_graphs_out(cls, config: Any) -> None:
        """Where the device captures no graphs: refuse those that the user asks for, before vLLM's default for all.

        Raises:
            UnsupportedFeatureError: a `cudagraph_mode` was asked for.
        """
        from vllm.config import CUDAGraphMode  # vllm.config imports the platform: not at the top

        if cls.support_static_graph_mode():
            return
        if config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
            raise UnsupportedFeatureError(
                f"this device captures no graphs (torch.gcu has no GCUGraph; the emulated card never does): leave out "
                f"cudagraph_mode {config.cudagraph_mode.name}, or set it to NONE."
            )
        config.cudagraph_mode = CUDAGraphMode.NONE

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        from vllm.config import CompilationMode, CUDAGraphMode  # vllm.config imports the platform: not at the top

        behaviours.refuse_fork()
        behaviours.refuse_multi_step(vllm_config.additional_config)
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        if parallel.worker_cls == "auto":
            parallel.worker_cls = "vllm_integration.gcu_worker.GcuWorker"
        parallel.disable_custom_all_reduce = True
        quantised_cache.choose(vllm_config)
        refuse_what_has_no_kernels(vllm_config)
        if not cache.user_specified_block_size:
            cache.block_size = KV_BLOCK_SIZE
        if cache.cache_dtype.startswith("fp8") and not cls.supports_fp8():
            behaviours.log.warning(
                "gcu300 has no fp8: the KV cache is int8, a scale per token and head, instead of %s.", cache.cache_dtype
            )
            cache.cache_dtype = behaviours.KV_CACHE_DTYPES["int8"]
        config = vllm_config.compilation_config
        if not cls.support_static_graph_mode():
            config.cudagraph_mode = CUDAGraphMode.NONE  # whatever vLLM made of its optimisation level
        if config.mode == CompilationMode.VLLM_COMPILE and config.backend == "inductor":
            compilation.take_over(vllm_config, cls.get_compile_backend(), gcu_target())
            config.inductor_compile_config.update(inductor_settings(gcu_target(), resolve()))
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = behaviours.MULTIPROC_METHOD

    # The device.

    @classmethod
    def import_kernels(cls) -> None:
        """vLLM's own compiled kernels are for other devices."""

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        torch.gcu.set_device(device)

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        torch.gcu.manual_seed_all(seed)

    @classmethod
    def device_count(cls) -> int:
        return torch.gcu.device_count()

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return torch.gcu.get_device_name(device_id)

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return torch.gcu.get_device_properties(device_id).total_memory

    @classmethod
    def get_current_memory_usage(cls, device: Any = None) -> float:
        torch.gcu.empty_cache()
        torch.gcu.reset_peak_memory_stats(device)
        return torch.gcu.max_memory_allocated(device)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability | None:
        """None: vLLM would compare the vendor's numbers with NVIDIA's."""
        return None

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UnsupportedFeatureError(f"dtype {dtype} is not one of a GCU: use bfloat16, float16 or float32.")

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return torch.gcu.get_device_properties(device_id).sip_count

    @classmethod
    def inference_mode(cls) -> Any:
        return torch.no_grad()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return True

    @classmethod
    def is_sleep_mode_available(cls) -> bool:
        return False

    @classmethod
    def is_cumem_allocator_available(cls) -> bool:
        return False

    @classmethod
    def supports_fp8(cls) -> bool:
        """Only gcu400 has fp8 arithmetic."""
        return gcu_target() == "gcu400"

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return hasattr(torch.gcu, "GCUGraph")

    @classmethod
    def opaque_attention_op(cls) -> bool:
        return True

    @classmethod
    def check_runner_kv_caches_multi_layer(cls) -> None:
        """Cross attention and self attention of one layer have caches of their own."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        ours = versions.register_attention(*ATTENTION)
        asked = attn_selector_config
        if selected_backend is not None and selected_backend.name != ours:
            raise UnsupportedFeatureError(
                f"attention backend {selected_backend.name} is not for target gcu: leave it out, or name {ours}"
            )
        if asked.use_mla or asked.use_sparse:
            raise UnsupportedFeatureError("latent and sparse attention are not for target gcu yet: use target host.")
        return ATTENTION_WRITTEN if compilation.writes_apart(asked.attn_type) else ATTENTION[1]

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        if EMULATED:
            return "vllm_integration.gcu_worker.EmulatedCommunicator"
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
