"""Attention and the KV write: ours against vLLM's CPU kernels and torch's SDPA, in one run.

    python benchmarks/attention.py [--json FILE]

32 query heads, 8 KV heads, head size 128, bfloat16. Caches are larger than the CPU's: decode reads memory. They lie as
each engine makes them: ours in huge pages (`kernels/host/pages.py`), which the read that is compared with has too, and
vLLM's in pages of 4 KiB; its bfloat16 decode is also timed in huge ones. The speed of a virtual machine's memory
changes from minute to minute, so the read takes its turns among what is compared with it. Ours are called as layers of
vLLM's call them (`kernels/attention/layer.py`); the operations, which look at their arguments anew, are timed as well.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

import gcu_compile.kernels.attention  # noqa: F401  (defines torch.ops.gcu.*)
from gcu_compile.kernels.attention.layer import Layer, Step
from gcu_compile.kernels.host import pages

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 128
REPEATS = 15
DECODE, READ = "decode, 8 sequences of 4096", "a plain read of the bf16 KV's bytes"


def medians(functions: dict) -> dict[str, float]:
    """Milliseconds of each, in turns of random order."""
    times, order = {name: [] for name in functions}, list(functions)
    for round_ in range(REPEATS + 1):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            if round_:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def read(size: int):
    """A plain read of `size` bytes, all threads."""
    return pages.huge(torch.ones(size, dtype=torch.uint8)).view(torch.float32).sum


class Batch:
    """Sequences of `kv_len` tokens of which the last `q_len` are queries, in our caches and in vLLM's."""

    def __init__(self, sequences: int, kv_len: int, q_len: int):
        blocks = kv_len // BLOCK
        self.q = torch.randn(sequences * q_len, HEADS, DIM).bfloat16()
        self.table = torch.randperm(sequences * blocks).view(sequences, blocks).to(torch.int32)
        self.starts = torch.arange(sequences + 1, dtype=torch.int32) * q_len
        self.lens = torch.full((sequences,), kv_len, dtype=torch.int32)
        self.shape = sequences * blocks, KV_HEADS, BLOCK, DIM
        self.k, self.v = (pages.huge(torch.randn(self.shape).bfloat16()) for _ in range(2))

    def cache(self, kind: str) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Keys, values and their scales: as they are, or int8 with a scale of all or for each token and head."""
        if kind == "float":
            return self.k, self.v, {}
        dims = {"tensor": (0, 1, 2, 3), "token_head": (3,)}[kind]
        codes, scales = [], {}
        for name, x in (("k", self.k), ("v", self.v)):
            scale = x.float().abs().amax(dims, keepdim=True) / 127
            codes.append(pages.huge((x.float() / scale).round().to(torch.int8)))
            scales[f"{name}_scale"] = scale.view(1) if kind == "tensor" else scale.squeeze(-1)
        return *codes, scales

    def ours(self, kind: str = "float"):
        """A layer of vLLM's."""
        k, v, scales = self.cache(kind)
        if kind == "token_head":
            scales = {f"{name}_cache": scale for name, scale in scales.items()}
        layer = Layer(torch.bfloat16, HEADS, k, v, scale=DIM**-0.5, **scales)
        step, output = Step(self.table, self.starts, self.lens), torch.empty_like(self.q)

        def run():
            layer.attend(self.q, output, step)
            return output

        return run

    def operation(self, kind: str = "float"):
        k, v, scales = self.cache(kind)
        call = torch.ops.gcu.paged_attention
        return lambda: call(self.q, k, v, self.table, self.starts, self.lens, scale=DIM**-0.5, **scales)

    def vllm(self, kind: str = "auto", make=torch.empty):
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(torch.bfloat16, BLOCK, DIM, kind)
        dtype = torch.bfloat16 if kind == "auto" else torch.uint8
        k, v = (make(self.shape, dtype=dtype) for _ in range(2))
        slots = torch.arange(self.shape[0] * BLOCK)
        rows = [x.transpose(1, 2).reshape(-1, KV_HEADS, DIM).contiguous() for x in (self.k, self.v)]
        ops.cpu_attn_reshape_and_cache(*rows, k, v, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=kind)
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self.lens), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, seq_lens=self.lens,
            dtype=torch.bfloat16, query_start_loc=self.starts, causal=True, sliding_window_size=-1, isa=isa,
            enable_kv_split=True, dynamic_causal=None, kv_cache_dtype=kind,
        )  # fmt: skip
        output = torch.empty_like(self.q)

        def run():
            ops.cpu_attention_with_kv_cache(
                query=self.q, key_cache=k, value_cache=v, output=output, query_start_loc=self.starts,
                seq_lens=self.lens, scale=DIM**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
                block_table=self.table, softcap=0.0, scheduler_metadata=plan, s_aux=None, dynamic_causal=None,
                k_scale=1.0, v_scale=1.0, kv_cache_dtype=kind,
            )  # fmt: skip
            return output

        return run

    def sdpa(self):
        """One sequence, dense, causal from its first token on."""
        q = self.q.unsqueeze(0).transpose(1, 2).contiguous()
        k, v = (x[self.table[0].long()].transpose(0, 1).reshape(1, KV_HEADS, -1, DIM) for x in (self.k, self.v))
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def dense(self):
        q = self.q.unsqueeze(0).transpose(1, 2).contiguous()
        k, v = (x[self.table[0].long()].transpose(0, 1).reshape(1, KV_HEADS, -1, DIM) for x in (self.k, self.v))
        return lambda: torch.ops.gcu.attention(q, k, v, scale=DIM**-0.5, causal=True)


def encoder(heads: int, length: int, size: int, dtype: torch.dtype) -> dict:
    """Attention of an encoder of images or sound: what vLLM calls, and what we put there."""
    from vllm.v1.attention.ops.vit_attn_wrappers import apply_sdpa

    from vllm_integration.attention import encode

    q, k, v = torch.randn(3, 1, length, heads, size).to(dtype)
    torch.testing.assert_close(encode(q, k, v), apply_sdpa(q, k, v), rtol=2e-2, atol=2e-2)
    return {"ours": lambda: encode(q, k, v), "vLLM (torch SDPA)": lambda: apply_sdpa(q, k, v)}


def writes(tokens: int) -> dict:
    """Rotary embedding and KV write of `tokens` tokens: ours in one pass, vLLM's pair of kernels."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM).bfloat16()
    angles = torch.outer(torch.arange(4096.0), 10000.0 ** -(torch.arange(0, DIM, 2) / DIM))
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).bfloat16()
    positions, slots = torch.arange(tokens), torch.randperm(4096)[:tokens]
    shape = (4096 // BLOCK, KV_HEADS, BLOCK, DIM)
    k_cache, v_cache = (torch.zeros(shape).bfloat16() for _ in range(2))
    int8 = [torch.zeros(shape, dtype=torch.int8) for _ in range(2)]
    scales = {f"{name}_scale_cache": torch.zeros(shape[:3]) for name in "kv"}
    isa = _get_attn_isa(torch.bfloat16, BLOCK, DIM)
    theirs = [torch.zeros(shape).bfloat16() for _ in range(2)]
    fused = torch.ops.gcu.rope_and_cache
    layer = Layer(torch.bfloat16, HEADS, k_cache, v_cache, scale=DIM**-0.5)  # as our backend in vLLM has them

    def vllm():
        q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
        ops.rotary_embedding(positions, q, k, DIM, cos_sin, True)
        k, v = (x.unflatten(1, (KV_HEADS, DIM)) for x in (k, v))
        ops.cpu_attn_reshape_and_cache(k, v, *theirs, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")

    return {
        "ours, a layer of vLLM's": lambda: layer.rotate_and_write(qkv, cos_sin, positions, slots),
        "ours, the operation": lambda: fused(qkv, cos_sin, positions, slots, k_cache, v_cache),
        "ours, int8 per token and head": lambda: fused(qkv, cos_sin, positions, slots, *int8, **scales),
        "vLLM's rotary, then its write": vllm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.cpu._init_amx()  # vLLM's kernels die without, where the CPU has it
    decode, prefill = Batch(8, 4096, 1), Batch(1, 2048, 2048)
    expected = decode.vllm()()
    torch.testing.assert_close(decode.operation()(), expected, rtol=2e-2, atol=2e-3)
    for kind in ("float", "tensor", "token_head"):
        torch.testing.assert_close(decode.ours(kind)(), expected, rtol=2e-2, atol=2e-3 if kind == "float" else 1e-2)
    torch.testing.assert_close(prefill.ours()(), prefill.sdpa()()[0].transpose(0, 1), rtol=2e-2, atol=2e-2)
    cache = decode.k.nbytes + decode.v.nbytes
    tables = {
        DECODE: {
            READ: read(cache),
            "ours bf16 KV": decode.ours(),
            "ours int8 KV": decode.ours("tensor"),
            "ours int8 KV, per token and head": decode.ours("token_head"),
            "ours bf16 KV, the operation": decode.operation(),
            "vLLM bf16 KV": decode.vllm(),
            "vLLM bf16 KV, huge pages": decode.vllm(make=pages.empty),
            "vLLM fp8 KV": decode.vllm("fp8"),
        },
        "causal prefill of 2048": {
            "ours paged": prefill.ours(),
            "ours dense": prefill.dense(),
            "vLLM": prefill.vllm(),
            "torch SDPA": prefill.sdpa(),
        },
    }
    for name, sizes in {"Whisper small": (12, 1500, 64), "Qwen2-VL, 1024 patches": (16, 1024, 80)}.items():
        for dtype in (torch.bfloat16, torch.float32):
            tables[f"encoder of {name}, {dtype}"] = encoder(*sizes, dtype)
    tables |= {f"rotary and KV write of {tokens} tokens": writes(tokens) for tokens in (16, 512)}
    results = {}
    for title, functions in tables.items():
        found = results[title] = medians(functions)
        print(f"\n{title}\n")
        for name, value in found.items():
            print(f"  {name:36} {value:8.3f} ms")
    found = results[DECODE]
    print(f"\n{torch.get_num_threads()} threads read {cache / found[READ] / 1e6:.1f} GB/s; ", end="")
    print(f"decode of bf16 KV, {found[READ] / found['ours bf16 KV']:.2f} of that")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
