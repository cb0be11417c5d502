"""Quantised layers of vLLM on `gcu::dequant_gemm`, `gcu::int8_gemm` and their grouped forms, chosen from the
checkpoint by vLLM itself.

    gptq.py         GPTQ int4/int8, v1/v2 zeros, symmetric or not, desc_act     in the place of vLLM's configuration
    awq.py          AWQ int4                                                    in the place of vLLM's configuration
    compressed.py   compressed-tensors W4A16, W8A16, W8A8 int8, int8 KV cache   kernels first of vLLM's lists
    kv_scales.py    the scales of a checkpoint's int8 KV cache
    experts.py      the experts of a mixture, in each of these forms
    named.py        the names w4a16, w8a16, w8a8 and their c8 forms: a checkpoint of that kind, or any, rounded at load

A weight is repacked once, when its layer has been loaded: one layer's copy exists at a time. While a graph is
traced, a layer is written as what it means (unpack, subtract, scale, matmul), and the compiler's rule makes the
operation of it; a call outside of a graph is that operation directly.

To add a checkpoint format: a layout in `kernels/dequant_gemm/layouts.py` if its words are new, a module here that
brings its tensors into `formats.prepare`, a line in `install`, and a row in `tests/vllm/quantised.py`.
"""

from __future__ import annotations

from vllm_integration import vllm_private


def install() -> None:
    """Put our configurations and kernels in place of vLLM's. Idempotent."""
    from vllm_integration.quantization import awq, compressed, gptq, named

    vllm_private.replace_quantization_configs(
        {
            **dict.fromkeys(("gptq", "gptq_marlin", "auto_gptq"), gptq.GPTQConfig),
            **dict.fromkeys(("awq", "awq_marlin", "auto_awq"), awq.AWQConfig),
            "compressed-tensors": compressed.CompressedConfig,
            **named.CONFIGS,
        }
    )
    vllm_private.prefer_linear_kernels(compressed.MixedPrecisionKernel, compressed.Int8Kernel)
