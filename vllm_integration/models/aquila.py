"""Aquila, Aquila2: Llama under another name."""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaForCausalLM


class AquilaForCausalLM(LlamaForCausalLM):
    """Weights, names and arithmetic of Llama."""
