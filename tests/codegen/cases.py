"""Functions with the shapes of an LLM's graphs, compiled for the card and run by Triton's interpreter on the CPU."""

import torch
import torch.nn.functional as F

bf16, f32, i64, i32 = torch.bfloat16, torch.float32, torch.int64, torch.int32


def rms_norm(x, w):
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def add_rms_norm(x, residual, w):
    residual = x + residual
    return rms_norm(residual, w), residual


def layer_norm(x, w, b):
    return F.layer_norm(x, (x.shape[-1],), w, b)


def rotary(x, cos, sin):
    x = x.unflatten(-1, (-1, 64)).transpose(1, 2)
    turned = torch.cat([-x[..., 32:], x[..., :32]], -1)
    return x * cos + turned * sin


def rotary_tables(positions, frequencies):
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(bf16), angles.sin().to(bf16)


def interleaved_rotary(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def pair_rotary(x, cos, sin):
    head, rest = x[..., :32], x[..., 32:]
    turned = torch.stack((-head[..., 1::2], head[..., 0::2]), -1).flatten(-2)
    return torch.cat([head * cos + turned * sin, rest], -1)


def head_norm(x, w):
    return rms_norm(x.unflatten(-1, (-1, 64)), w).flatten(-2)


def silu_mul(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def gelu(x):
    return F.gelu(x)


def embedding(ids, w):
    return F.embedding(ids, w) * 8.0


def cache_write(cache, positions, new):
    return cache.index_copy(2, positions, new.transpose(1, 2))


def repeat_kv(x):
    return x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


def masked_softmax(scores, mask):
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)


def causal_softmax(scores):
    n = scores.shape[-1]
    rows = torch.arange(n, device=scores.device)
    return torch.softmax(scores.masked_fill(rows[None] > rows[:, None], -1e9), -1)


def alibi(scores, slopes):
    n = scores.shape[-1]
    distance = torch.arange(n, device=scores.device)[None] - torch.arange(n, device=scores.device)[:, None]
    return torch.softmax(scores + slopes[:, None, None] * distance, -1)


def transposed_copy(x):
    return x.t().contiguous()


def column_sum(x):
    return x.float().sum(0)


def column_max(x):
    return x.amax(0), x.amin(-1)


def group_sum(x):
    return x.unflatten(0, (-1, 6)).sum(1)


def variance(x):
    return x.float().var(-1), x.float().mean(-1)


def log_softmax(x):
    return torch.log_softmax(x.float(), -1)


def all_reductions(x):
    return x.sum(), x.amax(), (x > 0).any(), (x > 0).sum()


def int_arithmetic(ids):
    return ids * 3 + torch.arange(ids.shape[-1], device=ids.device), (ids == 2).sum(-1)


def where_chain(x, y):
    return torch.where(x > y, torch.sqrt(x.abs()), torch.tanh(y) / 3)


def sliding_mask(x):
    n = x.shape[-1]
    i = torch.arange(n, device=x.device)
    keep = (i[:, None] >= i[None]) & (i[:, None] - i[None] < 4)
    return x * keep


def padded(x):
    return F.pad(x, (1, 2, 0, 3), value=2.0) * 2


def rolled_concat(a, b):
    return torch.cat([a, b, a + 1], 1)


def quantise(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).clamp(-128, 127).to(torch.int8), scale


def unpack_int4(packed, scale):
    low, high = packed & 15, packed >> 4
    return (torch.stack((low, high), -1).flatten(-2).float() - 8) * scale


def strided_slice(x):
    return x[::2, 1::3] + 1


def scalar(x):
    return x * 2 + 1


def top_choices(x):
    weights, chosen = torch.topk(torch.softmax(x.float(), -1), 2)
    return weights / weights.sum(-1, keepdim=True), chosen


def largest(x):
    return x.argmax(-1), x.cumsum(-1)


def gathered(x, ids):
    return torch.gather(x, 1, ids) * 2


# name -> (function, shapes as (shape, dtype)). Integers are drawn below 8, so that they index any of the shapes.
CASES = {
    "rms_norm": (rms_norm, [((2, 16, 576), bf16), ((576,), bf16)]),
    "rms_norm_one_row": (rms_norm, [((1, 1, 4096), bf16), ((4096,), bf16)]),
    "rms_norm_odd": (rms_norm, [((3, 5, 77), f32), ((77,), f32)]),
    "add_rms_norm": (add_rms_norm, [((1, 33, 256), bf16), ((1, 33, 256), bf16), ((256,), bf16)]),
    "layer_norm": (layer_norm, [((7, 300), f32), ((300,), f32), ((300,), f32)]),
    "layer_norm_long": (layer_norm, [((2, 40000), f32), ((40000,), f32), ((40000,), f32)]),
    "rotary": (rotary, [((2, 16, 576), bf16), ((2, 1, 16, 64), bf16), ((2, 1, 16, 64), bf16)]),
    "rotary_tables": (rotary_tables, [((1, 9), i64), ((32,), f32)]),
    "interleaved_rotary": (interleaved_rotary, [((5, 3, 32), f32), ((5, 1, 16), f32), ((5, 1, 16), f32)]),
    "pair_rotary": (pair_rotary, [((2, 9, 5, 80), bf16), ((2, 1, 5, 32), bf16), ((2, 1, 5, 32), bf16)]),
    "head_norm": (head_norm, [((4, 320), f32), ((64,), f32)]),
    "silu_mul": (silu_mul, [((5, 22), f32)]),
    "silu_mul_wide": (silu_mul, [((3, 11008), bf16)]),
    "gelu_tanh": (gelu_tanh, [((4, 4096), f32)]),
    "gelu": (gelu, [((9, 1024), bf16)]),
    "embedding": (embedding, [((2, 7), i64), ((50, 96), bf16)]),
    "cache_write": (cache_write, [((1, 3, 20, 16), f32), ((4,), "distinct"), ((1, 4, 3, 16), f32)]),
    "repeat_kv": (repeat_kv, [((1, 2, 5, 16), f32)]),
    "masked_softmax": (masked_softmax, [((2, 3, 8, 40), f32), ((2, 1, 8, 40), torch.bool)]),
    "causal_softmax": (causal_softmax, [((2, 12, 12), f32)]),
    "alibi": (alibi, [((4, 10, 10), f32), ((4,), f32)]),
    "transposed_copy": (transposed_copy, [((70, 33), f32)]),
    "column_sum": (column_sum, [((50, 33), bf16)]),
    "column_max": (column_max, [((50, 33), f32)]),
    "group_sum": (group_sum, [((24, 40), f32)]),
    "variance": (variance, [((5, 1000), f32)]),
    "variance_long": (variance, [((2, 70001), f32)]),
    "log_softmax_long": (log_softmax, [((2, 50000), bf16)]),
    "all_reductions": (all_reductions, [((13, 21), f32)]),
    "int_arithmetic": (int_arithmetic, [((3, 11), i64)]),
    "where_chain": (where_chain, [((4, 9), f32), ((4, 9), f32)]),
    "sliding_mask": (sliding_mask, [((9, 9), f32)]),
    "padded": (padded, [((3, 5), f32)]),
    "rolled_concat": (rolled_concat, [((3, 5, 4), f32), ((3, 2, 4), f32)]),
    "quantise": (quantise, [((6, 128), f32)]),
    "unpack_int4": (unpack_int4, [((4, 16), torch.uint8), ((4, 1), f32)]),
    "strided_slice": (strided_slice, [((8, 20), f32)]),
    "scalar": (scalar, [((), f32)]),
    "top_choices": (top_choices, [((5, 8), bf16)]),
    "largest": (largest, [((5, 8), f32)]),
    "gathered": (gathered, [((5, 9), f32), ((5, 4), i64)]),
}
