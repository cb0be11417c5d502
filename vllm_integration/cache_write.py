"""The write of keys and values as an operation of its own, which rule `rope_and_cache` joins to what precedes it.

    vLLM's graph      q, k = rotary(norm(q), norm(k));  token = unified_kv_cache_update(k, v, layer)
                      unified_attention_with_output(q, k, v, output, layer, token)
    here, before it   ... attention(q, v, v, output, layer, token): our attention reads keys from the cache, so that
    is split          nothing but the write needs the rotated ones (`keys_from_the_cache`)
    lowered           q, token = gcu_vllm::rope_and_cache(qkv, cos_sin, positions, ..., layer)

Only where a graph is compiled and the rule is on: without it the write is part of attention's call, for an operation
of its own would cost each layer one more call (`compilation.writes_apart`).
"""

from __future__ import annotations

import torch
from torch.library import Library
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

from gcu_compile.kernels.attention import rope
from gcu_compile.kernels.attention.softmax import compute_dtype
from gcu_compile.lowering.rules import rope_and_cache as rule
from vllm_integration import vllm_private

LIBRARY = Library("gcu_vllm", "FRAGMENT")
layer_name_of = vllm_private.layer_name_resolver()


def rope_and_cache(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    heads: int,
    head_dim: int,
    interleaved: bool,
    eps: float,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gcu::rope_and_cache` with the cache and the slots of a layer of vLLM's forward context.

    Returns:
        q [tokens, heads, head_dim], and an empty tensor by which attention is ordered after the write.
    """
    name = layer_name_of(layer_name)
    _, layer, kv_cache, slots = get_attention_context(name)
    if slots is None or not kv_cache.numel():  # a profiling run: there is no cache yet
        q = rotated(qkv, cos_sin, positions, q_norm, heads, head_dim, interleaved, eps)
    else:
        known = layer.impl.layer_of(layer, qkv, kv_cache)
        q = known.rotate_and_write(qkv, cos_sin, positions, slots, q_norm, k_norm, interleaved=interleaved, eps=eps,
                                   site=f"{rule.NAME}|{name}|")  # fmt: skip
    return q, qkv.new_empty(0)


def rotated(qkv, cos_sin, positions, q_norm, heads, head_dim, interleaved, eps) -> torch.Tensor:
    """The queries of `gcu::rope_and_cache`, where nothing is written."""
    q = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim)).to(compute_dtype(qkv.dtype))
    rows = (cos_sin if positions is None else cos_sin[positions]).to(q.dtype)
    return rope.rotate(rope.normalise(q, q_norm, eps), *rows.chunk(2, -1), interleaved).to(qkv.dtype)


def _fake(qkv, cos_sin, positions, q_norm, k_norm, heads, head_dim, interleaved, eps, layer_name):
    return qkv.new_empty(qkv.shape[0], heads, head_dim), qkv.new_empty(0)


def keys_from_the_cache(graph: torch.fx.GraphModule) -> None:
    """In vLLM's whole graph, before it is split: attention after a write of its keys is no user of the keys.

    The operation's `key` may not be None, so that it gets the values twice; our backend looks at neither.
    """
    attention, update = torch.ops.vllm.unified_attention_with_output, torch.ops.vllm.unified_kv_cache_update
    for node in graph.graph.nodes:
        if node.target in (attention, attention.default):
            token = node.kwargs.get("kv_cache_dummy_dep")
            if isinstance(token, torch.fx.Node) and token.target in (update, update.default):
                query, _, value, *rest = node.args
                node.args = (query, value, value, *rest)


def install() -> None:
    """Define the operation and tell the lowering engine of vLLM's."""
    if not hasattr(torch.ops.gcu_vllm, "rope_and_cache"):
        direct_register_custom_op("rope_and_cache", rope_and_cache, [], _fake, LIBRARY)
    vllm_private.before_splitting(keys_from_the_cache)
    rule.known[torch.ops.vllm.unified_kv_cache_update.default] = torch.ops.gcu_vllm.rope_and_cache.default
