"""The worker of a GCU: vLLM's device worker on `torch.gcu`, with our sampler."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.utils import request_memory
from vllm.v1.worker.workspace import init_workspace_manager

from gcu_compile.backend import inductor_settings
from gcu_compile.options import resolve
from gcu_compile.targets.select import gcu_target
from vllm_integration import vllm_private
from vllm_integration.frames import with_room
from vllm_integration.sampler import GcuSampler
from vllm_integration.slots import slot_mapping


class GcuModelRunner(GPUModelRunner):
    """vLLM's model runner; what it does in CUDA-only Triton kernels is done in torch operations."""

    def __init__(self, vllm_config: Any, device: torch.device):
        super().__init__(vllm_config, device)
        sampler = self.sampler
        self.sampler = GcuSampler(
            self, logprobs_mode=sampler.logprobs_mode, use_fp64_gumbel=getattr(sampler, "use_fp64_gumbel", False)
        )

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        """New blocks are zeroed, so that what an earlier request left cannot be read."""
        caches = {}
        for group in self.kv_cache_config.kv_cache_groups:
            if isinstance(group.kv_cache_spec, FullAttentionSpec):
                for name in group.layer_names:
                    layer = self.compilation_config.static_forward_context.get(name)
                    cache = getattr(layer, "kv_cache", None)
                    if isinstance(cache, torch.Tensor):
                        caches[cache.data_ptr()] = cache
        for cache in caches.values():
            cache[block_ids] = 0


class GcuWorker(Worker):
    """One card, or one emulated card."""

    execute_model = with_room(Worker.execute_model)
    sample_tokens = with_room(Worker.sample_tokens)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        """No pool of its own: there is no sleep mode."""
        return nullcontext()

    def init_device(self) -> None:
        parallel = self.parallel_config
        count = torch.gcu.device_count()
        if self.local_rank >= count:
            raise RuntimeError(
                f"worker {self.rank} needs gcu:{self.local_rank}, and {count} cards are visible. Lower "
                f"tensor_parallel_size ({parallel.tensor_parallel_size}), or show more in TOPS_VISIBLE_DEVICES."
            )
        inductor_settings(gcu_target(), resolve())  # registers code generation in this process
        vllm_private.cuda_names_mean_gcu()
        vllm_private.skip_kernel_warmup()
        vllm_private.replace_slot_mapping(slot_mapping)
        self.device = torch.device("gcu", self.local_rank)
        current_platform.set_device(self.device)
        current_platform.check_if_supports_dtype(self.model_config.dtype)
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, current_platform.dist_backend
        )
        set_random_seed(self.model_config.seed)
        gc.collect()
        torch.gcu.empty_cache()
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        init_workspace_manager(self.device, 1)
        self.model_runner = GcuModelRunner(self.vllm_config, self.device)


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor, which gloo takes."""
    return torch.ops.gcu_emulator.host_view(tensor) if tensor.device.type == "gcu" else tensor


class EmulatedCommunicator(DeviceCommunicatorBase):
    """Collectives of emulated cards: gloo on the host memory behind them."""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        out = input_.clone()
        torch.distributed.all_reduce(_host(out), group=self.device_group)
        return out

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        parts = [torch.empty_like(input_) for _ in range(self.world_size)]
        torch.distributed.all_gather([_host(p) for p in parts], _host(input_.contiguous()), group=self.device_group)
        return torch.cat(parts, dim)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        mine = self.rank_in_group == dst
        parts = [torch.empty_like(input_) for _ in range(self.world_size)] if mine else None
        torch.distributed.gather(
            _host(input_.contiguous()),
            [_host(part) for part in parts] if mine else None,
            dst=self.ranks[dst],
            group=self.device_group,
        )
        return torch.cat(parts, dim) if mine else None

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        torch.distributed.broadcast(_host(tensor), self.ranks[src], self.device_group)
        return tensor
