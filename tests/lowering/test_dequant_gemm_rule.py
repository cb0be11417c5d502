"""Dequantisation as people write it becomes `gcu::dequant_gemm`; what is close but different does not, and says why."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import lowered
from spelled import FLOATS, G, K, N, data, fused, near_miss, run

from gcu_compile.kernels import registry
from gcu_compile.kernels.dequant_gemm import layouts

# Ten spellings of one thing. Each takes what `data` makes, packed as it wants, and returns (function, arguments).


def gptq(d, plus_one=False, g_idx=False):
    """AutoGPTQ / Hugging Face: int32 words along K, packed zeros, scales gathered by g_idx or repeated."""
    qweight = layouts.pack(d["codes"], layouts.get("gptq_int4"))
    zeros = (d["zeros"] - 1) % 16 if plus_one else d["zeros"]
    qzeros = layouts.pack(zeros, layouts.get("int4_rows_i32"))
    index = torch.randint(0, len(d["scales"]), (K,), dtype=torch.int32)

    def fn(x, qweight, qzeros, scales, index):
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = ((qweight.unsqueeze(1) >> shifts.view(1, 8, 1)) & 15).reshape(K, N)
        zeros = ((qzeros.unsqueeze(2) >> shifts.view(1, 1, 8)) & 15).reshape(-1, N)
        if plus_one:
            zeros = (zeros + 1) & 15
        if g_idx:
            weight = scales[index.long()] * (codes - zeros[index.long()])
        else:
            size = K // scales.shape[0]
            spread = zeros.repeat_interleave(size, 0)
            weight = scales.repeat_interleave(size, 0) * (codes - spread).to(scales.dtype)
        return torch.matmul(x, weight.to(x.dtype))

    return fn, (d["x"], qweight, qzeros, d["scales"], index)


def awq(d):
    """AutoAWQ: words along N in the order 0 2 4 6 1 3 5 7, undone by a gather."""
    qweight = layouts.pack(d["codes"], layouts.get("awq_int4"))
    order = [0, 4, 1, 5, 2, 6, 3, 7]

    def fn(x, qweight, zeros, scales):
        shifts = torch.tensor(order, dtype=torch.int32) * 4
        codes = ((qweight.unsqueeze(-1) >> shifts) & 15).reshape(K, N)
        size = K // scales.shape[0]
        weight = (codes - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)
        return x @ weight

    return fn, (d["x"], qweight, d["zeros"], d["scales"])


def nibbles(d, bias=True):
    """Ten lines of anyone's: two codes a byte, groups as a dimension, F.linear with a bias."""
    packed = layouts.pack(d["codes"], layouts.get("int4_rows"))

    def fn(x, packed, scales, bias):
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(N, -1, K // scales.shape[1])
        weight = (codes.to(x.dtype) - 8) * scales.unsqueeze(-1)
        return torch.nn.functional.linear(x, weight.reshape(N, K), bias if d.get("with_bias", True) else None)

    return fn, (d["x"], packed, d["scales"].T.contiguous(), d["bias"])


def torchao_int8(d):
    """torchao's int8 weight-only: a scale per output, applied to the weight."""
    weight = (d["codes"] - 8).to(torch.int8)

    def fn(x, weight, scales):
        return torch.nn.functional.linear(x, weight.to(x.dtype) * scales.unsqueeze(1))

    return fn, (d["x"], weight, d["scales"][0].contiguous())


def compressed_tensors(d):
    """compressed-tensors pack-quantized with zero points: codes and zeros centred on 0."""
    packed = layouts.pack(d["codes"], layouts.get("int4_rows_i32"))

    def fn(x, packed, scales, zeros):
        codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], dim=-1).reshape(N, K) - 8
        codes = codes.view(N, scales.shape[1], -1)
        weight = ((codes - zeros.unsqueeze(-1)).to(scales.dtype) * scales.unsqueeze(-1)).view(N, K)
        return x @ weight.T

    return fn, (d["x"], packed, d["scales"].T.contiguous(), (d["zeros"] - 8).T.to(torch.int8).contiguous())


def signed_nibbles(d):
    """Two's complement by a comparison."""
    packed = layouts.pack(d["codes"] - 8, layouts.get("int4_rows_signed"))

    def fn(x, packed, scale):
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(N, K).to(torch.int8)
        codes = torch.where(codes > 7, codes - 16, codes)
        return x @ (codes.to(x.dtype) * scale).T

    return fn, (d["x"], packed, d["scales"][0, 0].clone())


SPELLINGS = {
    "gptq": gptq,
    "gptq v1 zeros": lambda d: gptq(d, plus_one=True),
    "gptq act-order": lambda d: gptq(d, g_idx=True),
    "awq": awq,
    "nibbles, groups, bias": nibbles,
    "torchao int8": torchao_int8,
    "compressed-tensors": compressed_tensors,
    "signed nibbles, one scale": signed_nibbles,
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_fused(name, dtype):
    fn, args = SPELLINGS[name](data(dtype))
    fused(fn, *args)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(SPELLINGS)), st.sampled_from([1, 2, 8, 32]), st.integers(0, 99))
def test_any_group_size(name, groups, seed):
    fn, args = SPELLINGS[name](data(torch.float32, groups, seed))
    fused(fn, *args)


def test_rows_may_be_symbolic_and_a_batch():
    fn, args = nibbles(data())
    x = torch.randn(2, 5, K)
    torch._dynamo.mark_dynamic(x, 1)
    fused(fn, x, *args[1:])


def test_a_weight_of_symbolic_size_is_refused():
    fn, args = torchao_int8(data())
    matches, _ = run(fn, *args, dynamic=True)
    assert [(m.status, m.reason) for m in matches] == [("skipped", "the weight has a symbolic size")]


def test_through_inductor_the_kernel_runs_on_weights_repacked_once():
    fn, args = gptq(data(torch.bfloat16))
    before = registry.calls["dequant_gemm", "host_cpp"]
    fused(fn, *args, inductor=True)
    assert registry.calls["dequant_gemm", "host_cpp"] > before


def widened(scales, zeros):
    """(graph, report) of scales and zeros of other dtypes, widened to float32 for the arithmetic."""
    d = data()
    packed = layouts.pack(d["codes"], layouts.get("int4_rows"))

    def fn(x, packed, scales, *zeros):
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(N, K).float()
        zero = zeros[0].float().repeat_interleave(K // G, 0).T if zeros else 8
        return x @ ((codes - zero) * scales.float().repeat_interleave(K // G, 0).T).T

    given = [] if zeros is None else [d["zeros"].to(zeros)]
    return lowered(fn, d["x"], packed, d["scales"].to(scales), *given)


@pytest.mark.parametrize("zeros", [torch.int8, torch.uint8, torch.int16, torch.bfloat16, None])
@pytest.mark.parametrize("scales", FLOATS)
def test_scales_and_zeros_reach_the_operation_as_they_lie(scales, zeros):
    """What widens them in the graph would make other tensors of them at every step."""
    gm, report = widened(scales, zeros)
    assert [match.status for match in report.matches if match.rule == "dequant_gemm"] == ["fused"]
    (call,) = [node for node in gm.graph.nodes if node.target == torch.ops.gcu.dequant_gemm.default]
    assert all(one.op == "placeholder" for one in call.all_input_nodes)


@pytest.mark.parametrize(
    ("scales", "zeros"),
    [(torch.float8_e4m3fn, None), (torch.float32, torch.float8_e4m3fn), (torch.float32, torch.bool),
     (torch.float32, torch.uint16)],
)  # fmt: skip
def test_what_the_operation_does_not_read_is_widened_for_it(scales, zeros):
    gm, report = widened(scales, zeros)
    assert [match.status for match in report.matches if match.rule == "dequant_gemm"] == ["fused"]
    (call,) = [node for node in gm.graph.nodes if node.target == torch.ops.gcu.dequant_gemm.default]
    assert call.args[2 if zeros is None else 3].meta["val"].dtype == torch.float32


def test_a_cast_that_rounds_scales_stays():
    d = data()
    packed = layouts.pack(d["codes"], layouts.get("int4_rows"))

    def fn(x, packed, scales):
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(N, K).float()
        return x @ ((codes - 8) * scales.bfloat16().float().repeat_interleave(K // G, 0).T).T

    gm, _ = lowered(fn, d["x"], packed, d["scales"])
    (call,) = [node for node in gm.graph.nodes if node.target == torch.ops.gcu.dequant_gemm.default]
    assert call.args[2].op == "call_function" and call.args[2].meta["val"].dtype == torch.bfloat16
    fused(fn, d["x"], packed, d["scales"])


def test_layers_of_one_structure_are_probed_once(monkeypatch):
    from gcu_compile.lowering.rules import quantised_weight

    quantised_weight._known.clear()
    fn, args = torchao_int8(data())
    runs = []
    examine = quantised_weight._examine
    monkeypatch.setattr(quantised_weight, "_examine", lambda *a: (runs.append(1), examine(*a))[1])

    def twice(x, w1, s1, w2, s2):
        return fn(x, w1, s1) + fn(x, w2, s2)

    matches, _ = run(twice, *args, *args[1:])
    assert [m.status for m in matches] == ["fused", "fused"] and len(runs) == 1


def test_a_plain_linear_is_not_its_business():
    matches, _ = run(lambda x, w: torch.nn.functional.linear(x, w), torch.randn(3, K), torch.randn(N, K))
    assert matches == []


def test_a_scaled_float_weight_is_not_its_business():
    matches, _ = run(lambda x, w, s: x @ (w * s), torch.randn(3, K), torch.randn(K, N), torch.rand(N))
    assert matches == []


def test_near_miss_a_code_of_other_bits():
    d = data()
    packed = layouts.pack(d["codes"], layouts.get("int4_rows"))

    def fn(x, packed, scales):  # the upper code shifted by three
        codes = torch.stack([packed & 15, (packed >> 3) & 15], dim=-1).reshape(N, K)
        return x @ ((codes.to(x.dtype) - 8) * scales.unsqueeze(1)).T

    near_miss("no known layout", fn, d["x"], packed, d["scales"][0].contiguous())


def test_near_miss_not_centred():
    d = data()
    packed = layouts.pack(d["codes"], layouts.get("int4_rows"))

    def fn(x, packed, scales):
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(N, K)
        return x @ ((codes.to(x.dtype) - 7) * scales.unsqueeze(1)).T

    near_miss("not centred on its midpoint", fn, d["x"], packed, d["scales"][0].contiguous())


def test_near_miss_groups_that_are_no_neighbours():
    d = data()
    weight = (d["codes"] - 8).to(torch.int8)

    def fn(x, weight, scales):  # group of k is k % 4
        return x @ (weight.T.to(x.dtype) * scales.repeat(K // G, 1))

    near_miss("do not follow groups of neighbouring inputs", fn, d["x"], weight, d["scales"])


def test_near_miss_rounded_before_a_wider_product():
    d = data()

    def fn(x, weight, scales):
        return x @ (weight.to(torch.bfloat16) * scales).T.float()

    weight, scales = (d["codes"] - 8).to(torch.int8), d["scales"][0].unsqueeze(1).bfloat16()
    near_miss("rounded to torch.bfloat16 for a wider product", fn, d["x"], weight, scales)


def test_near_miss_addend_that_is_no_bias():
    d = data()

    def fn(x, weight, scales, other):
        return torch.addmm(other, x, (weight.to(x.dtype) * scales).T)

    args = (d["x"], (d["codes"] - 8).to(torch.int8), d["scales"][0].unsqueeze(1), torch.randn(3, N))
    near_miss("not a bias", fn, *args)
