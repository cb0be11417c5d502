"""vLLM's linear layers without an engine: made, loaded from a checkpoint's tensors and prepared, for any shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

QKV = ("q_proj", "k_proj", "v_proj")


@contextmanager
def shard(rank: int = 0, of: int = 1) -> Iterator[None]:
    """Layers that are made within belong to tensor-parallel rank `rank` of `of`; no processes are started."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    import vllm_integration

    vllm_integration.register()
    before = parallel_state._TP
    parallel_state._TP = SimpleNamespace(rank_in_group=rank, world_size=of)
    try:
        with set_current_vllm_config(VllmConfig()):
            yield
    finally:
        parallel_state._TP = before


def configuration(config: dict):
    """vLLM's configuration object for a `quantization_config`."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    made = get_quantization_config(config["quant_method"]).from_config(dict(config))
    made.packed_modules_mapping = {"qkv_proj": list(QKV), "gate_up_proj": ["gate_proj", "up_proj"]}
    return made


def make(kind: str, config, prefix: str, k: int, n: int | list[int]):
    """A layer: "column", "row", "merged" (n: list), or "qkv" (n: [query heads, KV heads], of 32)."""
    from vllm.model_executor.layers import linear

    common = {"bias": False, "quant_config": config, "prefix": prefix, "params_dtype": torch.float32}
    if kind == "column":
        return linear.ColumnParallelLinear(k, n, **common)
    if kind == "row":
        return linear.RowParallelLinear(k, n, input_is_parallel=True, reduce_results=False, **common)
    if kind == "merged":
        return linear.MergedColumnParallelLinear(k, n, **common)
    return linear.QKVParallelLinear(k, 32, *n, **common)


def fill(layer, tensors: dict[str, torch.Tensor], base: str, part: int | str | None = None) -> None:
    """Load a checkpoint's tensors of `base` into the layer, or into one part of a merged one."""
    for name, tensor in tensors.items():
        parameter = layer.get_parameter(name.removeprefix(f"{base}."))
        arguments = () if part is None else (part,)
        parameter.weight_loader(parameter, tensor, *arguments)


def experts(config, prefix: str, count: int, hidden: int, inner: int, of: int = 1):
    """The experts of a mixture, of a shard of `of`; gate and up have `inner` outputs before they are cut."""
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    sizes = {"num_experts": count, "top_k": 2, "hidden_size": hidden, "intermediate_size": inner}
    ranks = {"tp_size": of, "dp_size": 1, "pcp_size": 1}
    made = FusedMoEFactory(**sizes, **ranks, quant_config=config, prefix=prefix, params_dtype=torch.float32)
    return made.routed_experts


def fill_expert(layer, tensors: dict[str, torch.Tensor], base: str, part: str, expert: int) -> None:
    """Load a checkpoint's tensors of one projection of one expert; `part`: w1 (gate), w2 (down), w3 (up)."""
    for name, tensor in tensors.items():
        stored = f"{'w2' if part == 'w2' else 'w13'}_{name.removeprefix(f'{base}.')}"
        parameter = layer.get_parameter(stored)
        given = {"param": parameter, "loaded_weight": tensor, "weight_name": stored, "return_success": True}
        parameter.weight_loader(**given, shard_id=part, expert_id=expert)


def ready(layer):
    """The layer, prepared as after loading a model."""
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def apply(layer, x: torch.Tensor) -> torch.Tensor:
    """The layer on [M, K of the shard], without communication."""
    return layer.quant_method.apply(layer, x)
