"""Random graphs around every canonical rule and every recognised chain: the result is always that of float64 eager;
what is not rewritten says why; and each rule is met in a form in which it fires. Attention, integer products and logits
chains have modules of their own (`test_random_*.py`), as have quantised weights (`test_dequant_gemm_rule.py`) and
activations (`test_prologues_rule.py`).

A case is one rule's pattern with things in its way: an extra user of what is in the middle, views or copies between,
an operation in place, another dtype, an output that is the pattern itself, symbolic sizes, an odd or empty shape.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowered import check

from gcu_compile.lowering.rules import all_rules, elementwise
from gcu_compile.lowering.rules.canonical import RULES

SETTINGS = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SHAPES = [(2, 3, 8), (1, 1, 8), (5, 2, 16), (0, 3, 8), (3, 7, 24)]
convert = torch.ops.prims.convert_element_type


def between(x, case):
    """What stands between two parts of a pattern."""
    made = {
        "": lambda: x,
        "view": lambda: x.reshape(-1).reshape(x.shape),
        "copy": x.clone,
        "cast": lambda: x.double().to(x.dtype),
    }
    return made[case["between"]]()


def sliced(x, case):
    size = x.shape[-1] // 2
    parts = {
        "split": lambda: x.split(size, -1),
        "sizes": lambda: x.split([size, x.shape[-1] - size], -1),
        "chunk": lambda: x.chunk(2, -1),
    }[case["spelling"]]()
    return torch.cat([between(parts[1], case).sin(), parts[0]], -1)


def again(x, case):
    size = x.shape[-1] // 2
    view = {"split": lambda: x[..., :size], "sizes": lambda: x.mT, "chunk": lambda: x.unsqueeze(0)}[case["spelling"]]
    return view().sin() + between(view(), case).cos() * 2


def root(x, case):
    y = between(x * x + 1, case)
    if case["in_place"]:
        y = y.clone().add_(0.5)
    made = {"split": lambda: 1 / y.sqrt(), "sizes": lambda: y**-0.5, "chunk": lambda: y.sqrt().reciprocal()}
    return made[case["spelling"]]() * x


def mean(x, case):
    total = between(x.sum(-1, keepdim=case["in_place"]), case)
    return total / x.shape[-1] + (0 if case["spelling"] == "split" else total.sum())


def linear(x, case):
    x = x if case["in_place"] else x.flatten(0, 1)
    weight, bias = torch.ones(x.shape[-1], 6).to(x.dtype) / 8, torch.ones(6, dtype=x.dtype)
    product = between(x @ weight, case)
    out = product + (bias if case["spelling"] != "chunk" else bias[:1])
    return out if case["spelling"] != "sizes" else out + product.mean()


def integers(x, case):
    """torchao's product of bytes, of codes that do not depend on how x was rounded."""
    codes = torch.where(between(x, case).flatten(0, 1) > 0, 5, -7).to(torch.int8)
    weight = (torch.arange(x.shape[-1] * 16).view(-1, 16) % 23 - 11).to(torch.int8)
    product = torch._int_mm((codes.to(torch.int32) + 128).to(torch.uint8), weight)
    total = weight.sum({"split": 0, "sizes": -2, "chunk": 0}[case["spelling"]], keepdim=True, dtype=torch.int32)
    return ((product - total * 128) + (product - product if case["in_place"] else 0)).to(x.dtype) / 1024


# rule -> its pattern, with what the case puts in its way
PATTERNS = {
    "split_to_slice": sliced,
    "repeated_view": again,
    "noop_clone": lambda x, case: between(x.sin(), case).clone() * 2,
    "view_of_view": lambda x, case: between(x.sin().view(-1, x.shape[-1]), case).view(x.shape).view(-1).cos(),
    "noop_view": lambda x, case: between(x.view(x.shape), case).view(x.shape) * 3,
    "permute_of_permute": lambda x, case: between(x.permute(2, 0, 1), case).permute(0, 2, 1).permute(1, 2, 0).sin(),
    "noop_permute": lambda x, case: between(x.permute(0, 1, 2), case).sin(),
    "noop_slice": lambda x, case: torch.ops.aten.slice(between(x.sin(), case), 1, 0, 2**62) * 2,
    "noop_convert": lambda x, case: between(convert(x.sin(), x.dtype), case) * 2,
    "dtype_round_trip": lambda x, case: between(x.sin().to(torch.float64).to(x.dtype), case) * 2,
    "square": lambda x, case: between(x, case).pow(2) if not case["in_place"] else x.sin().pow_(2),
    "rsqrt": root,
    "times_one": lambda x, case: between(x.sin(), case) * 1.0 + x,
    "mean_of_sum": mean,
    "bias_of_mm": linear,
    "signed_int_mm": integers,
}


@st.composite
def cases(draw):
    return {
        "between": draw(st.sampled_from(["", "", "view", "copy", "cast"])),
        "spelling": draw(st.sampled_from(["split", "sizes", "chunk"])),
        "in_place": draw(st.booleans()),
        "returned": draw(st.booleans()),
        "extra_user": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])),
        "shape": draw(st.sampled_from(SHAPES)),
        "symbolic": draw(st.booleans()),
    }


def surrounded(pattern, case):
    """The pattern, with users of what goes in and out."""

    def fn(x):
        out = pattern(x, case)
        if not case["returned"]:
            out = out.tanh()
        return out + x.double().mean().nan_to_num().to(out.dtype) if case["extra_user"] else out

    return fn


def held(pattern, case, fired):
    """Lower one case, hold it against float64, and count what fired."""
    torch.manual_seed(0)
    x = torch.rand(case["shape"], dtype=case["dtype"]) + 0.25
    symbolic = case["symbolic"] and min(case["shape"][:2]) > 1
    _, report = check(surrounded(pattern, case), x, symbolic=symbolic, dims=(0, 1), length=4 * x.shape[-1])
    for match in report.matches:
        assert match.status == "fused" or match.reason, f"{match.rule}: not fused, and no reason is given"
    fired.update(report.fused)


def test_every_canonical_rule_is_here():
    assert PATTERNS.keys() == {rule.name for rule in RULES}
    mine = {rule.name for rule in (*RULES, *elementwise.RULES)} | {"attention"}
    elsewhere = {"dequant_gemm", "int8_gemm", "sample_chain", "rms_norm_quant", "silu_mul_quant", "rope_and_cache"}
    assert {rule.name for rule in all_rules()} - mine == elsewhere


@pytest.mark.parametrize("rule", PATTERNS)
def test_canonical(rule):
    fired: Counter = Counter()

    @SETTINGS
    @given(cases())
    def run(case):
        held(PATTERNS[rule], case, fired)

    run()
    assert fired[rule] >= 3, fired


SHAPED = sorted(PATTERNS.keys() - {"mean_of_sum", "bias_of_mm"})


@settings(SETTINGS, max_examples=8)
@given(st.lists(st.sampled_from(SHAPED), min_size=2, max_size=4), cases())
def test_chains_of_canonical_rules(names, case):
    def chain(x, case):
        for name in names:
            out = PATTERNS[name](x, case)
            x = out.reshape(x.shape).abs() * 0.5 + 0.25 if out.numel() == x.numel() else x + out.sum() * 0.01
        return x

    held(chain, case, Counter())


def layer_norm(x, case):
    wide = x.float() if x.dtype == torch.bfloat16 else x
    if case["spelling"] == "split":
        out = F.layer_norm(wide, wide.shape[-1:], eps=1e-3)
    else:
        dim = -2 if case["in_place"] else -1
        var, middle = torch.var_mean(wide, dim, correction=0, keepdim=True)
        out = (between(wide, case) - middle) * torch.rsqrt(var + 1e-3)
    return out.to(x.dtype)


def rotary(x, case):
    half = x.shape[-1] // 2
    one, two = x[..., :half], x[..., half:]
    angles = torch.arange(half) * 0.1
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    other = between(two, case) if case["between"] != "cast" else two * 1.5
    if case["spelling"] == "split":
        turned = torch.cat([-other, one], -1)
        return x * torch.cat([cos, cos], -1) + turned * torch.cat([sin, sin], -1)
    return torch.cat([one * cos - two * sin, two * cos + (other if case["in_place"] else one) * sin], -1)


@pytest.mark.parametrize("rule, pattern", [("layer_norm", layer_norm), ("rotary", rotary)])
def test_recognised_chains(rule, pattern):
    fired: Counter = Counter()

    @SETTINGS
    @given(cases())
    def run(case):
        held(pattern, case, fired)

    run()
    assert fired[rule] >= 3, fired
