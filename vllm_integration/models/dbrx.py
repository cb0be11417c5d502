"""DBRX: vLLM's class, whose weights find their places."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.models import dbrx
from vllm.model_executor.models.utils import WeightsMapper


class DbrxForCausalLM(dbrx.DbrxForCausalLM):
    """vLLM 0.32 moved the tensors of experts into a layer `routed_experts`, and DBRX's loader still looks beside it."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if any(".experts.routed_experts." in name for name, _ in self.named_parameters()):
            mapper = WeightsMapper(orig_to_new_substr={".experts.mlp.": ".experts.routed_experts.mlp."})
            weights = mapper.apply(weights)
        return super().load_weights(weights)
