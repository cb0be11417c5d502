"""Which process runs a lone host worker, and on which cores.

Stock vLLM gives a CPU worker a process of its own and keeps one core free for the scheduler, which waits for the
worker by spinning. On a machine of two cores that halves the compute. With one worker the scheduler and the model
never run at the same time (scheduling is synchronous, behaviour 2), so here the worker lives in the engine's
process and computes on every core that vLLM would have used or kept free; one process less also starts sooner.

`distributed_executor_backend="mp"` gives the worker its own process again, and tensor or pipeline parallel runs
always do.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from vllm_integration.behaviours import log

IN_PROCESS = "uni"


def keep_in_process(asked: Any, parallel: Any) -> None:
    """Undo the CPU platform's change of `asked`, the executor as the user or vLLM's defaults chose it."""
    if asked == IN_PROCESS and parallel.world_size == 1:
        parallel.distributed_executor_backend = IN_PROCESS


def bind(vllm_config: Any) -> list[int]:
    """Run an engine's main thread, and the OpenMP threads it will start, on the worker's cores; return them.

    Nothing is bound where the worker has a process of its own, which vLLM binds, nor where the engine lives in the
    user's process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), whose threads are the user's. The user's word on cores wins:
    `VLLM_CPU_OMP_THREADS_BIND` (a list, or `nobind`), `VLLM_CPU_NUM_OF_RESERVED_CPU` and `OMP_NUM_THREADS`.
    """
    from vllm import envs
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    in_engine = vllm_config.parallel_config.distributed_executor_backend == IN_PROCESS
    if not in_engine or not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        return []
    manager = OMPProcessManager(vllm_config)
    if manager.skip_setup:
        return []
    cores = list(manager.cpu_lists[0])
    if envs.VLLM_CPU_NUM_OF_RESERVED_CPU is None:
        cores += manager.reserved_cpu_list
    os.sched_setaffinity(0, cores)
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(cores))
    torch.set_num_threads(threads)
    log.info("The worker runs in the engine's process, with %d threads on cores %s.", threads, sorted(cores))
    return cores
