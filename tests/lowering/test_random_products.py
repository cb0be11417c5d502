"""Random graphs around the integer product and its scales: always the result of float64; what is not fused says why."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowered import check, statuses

SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# (rows, inputs, outputs)
SHAPES = [(5, 16, 8), (1, 8, 1), (33, 24, 40), (0, 8, 8), (17, 7, 3)]
ROWS = {"row": lambda m: (m, 1), "one": lambda m: (1, 1), "scalar": lambda m: (), "flat": lambda m: (m,)}
OUTPUTS = {"row": lambda n: (n,), "two": lambda n: (1, n), "scalar": lambda n: (), "many": lambda n: (2, n)}


@st.composite
def products(draw):
    """Choices that make one product, each independent of the others."""
    return {
        "shape": draw(st.sampled_from(SHAPES)),
        "spelling": draw(st.sampled_from(["_int_mm", "mm"])),
        "stored": draw(st.sampled_from(["rows", "columns"])),
        "codes": draw(st.sampled_from([torch.int8] * 4 + [torch.int16])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "order": draw(st.sampled_from(["rows", "outputs", "outputs", "rows", "together", "sum"])),
        "x_scale": draw(st.sampled_from(["row", "row", "one", "scalar", "", "flat"])),
        "scale": draw(st.sampled_from(["row", "two", "scalar", "", "many"])),
        "rounded": draw(st.sampled_from([False, False, True])),
        "between": draw(st.sampled_from(["", "", "view", "copy", "cast"])),
        "in_place": draw(st.booleans()),
        "extra_user": draw(st.sampled_from(["", "", "sum", "float"])),
        "symbolic": draw(st.booleans()),
    }


def plain(case):
    """Whether nothing stands in the rule's way."""
    m, k, n = case["shape"]
    fits = case["codes"] == torch.int8 and case["scale"] in ("row", "two", "scalar") and case["x_scale"] != "flat"
    simple = case["order"] in ("rows", "outputs") and case["between"] in ("", "cast") and not case["rounded"]
    return fits and simple and not case["extra_user"] and min(m, n) > 1


def function(case):
    def fn(x, weight, x_scale, scale, like):
        weight = weight.t() if case["stored"] == "rows" else weight
        if case["spelling"] == "_int_mm" and x.dtype == weight.dtype == torch.int8:
            total = torch._int_mm(x, weight)
        else:
            total = x.to(torch.int32) @ weight.to(torch.int32)
        wide = total.to(like.dtype if case["rounded"] else torch.promote_types(like.dtype, torch.float32))
        wide = {
            "": lambda: wide,
            "view": lambda: wide.unsqueeze(0).mul(1.0).squeeze(0),
            "copy": wide.clone,
            "cast": lambda: wide.double().to(wide.dtype),
        }[case["between"]]()
        factors = [one for one in (x_scale, scale) if one is not None]
        if case["order"] == "outputs":
            factors.reverse()
        if case["order"] == "together" and len(factors) == 2:
            factors = [factors[0] * factors[1]]
        out = wide
        for number, factor in enumerate(factors):
            if case["order"] == "sum" and number:
                out = out + factor
            elif case["in_place"] and torch.broadcast_shapes(out.shape, factor.shape) == out.shape:
                out = out.clone().mul_(factor)
            else:
                out = out * factor
        if case["extra_user"]:
            used = total.to(out.dtype) if case["extra_user"] == "sum" else wide
            out = out + used.mean(-1, keepdim=True)
        return out.to(like.dtype)

    return fn


def held(case, fired):
    """Lower one case, hold it against float64, and count what fired."""
    torch.manual_seed(0)
    m, k, n = case["shape"]
    if case["scale"] == "many" and m != 2:
        case = {**case, "shape": (2, k, n)}
        m = 2
    x = torch.randint(-128, 128, (m, k)).to(case["codes"])
    weight = torch.randint(-128, 128, (n, k) if case["stored"] == "rows" else (k, n)).to(torch.int8)
    x_scale = torch.rand(ROWS[case["x_scale"]](m)) / 64 + 1e-3 if case["x_scale"] else None
    scale = torch.rand(OUTPUTS[case["scale"]](n)) / 64 + 1e-3 if case["scale"] else None
    if case["x_scale"] == "flat" and m != n:
        x_scale = None  # [rows] fits no product of other outputs
    args = (x, weight, x_scale, scale, torch.zeros(1, dtype=case["dtype"]))
    symbolic = case["symbolic"] and m > 1
    _, report = check(function(case), *args, symbolic=symbolic, dims=(0,), length=k)
    found = statuses(report, "int8_gemm")
    for status, reason in found:
        assert status == "fused" or reason, "not fused, and no reason is given"
    if plain(case):
        assert [status for status, _ in found] == ["fused"], (case, found)
    fired.update(status for status, _ in found)


@pytest.mark.parametrize("examples", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_integer_products(examples):
    fired: Counter = Counter()

    @settings(SETTINGS, max_examples=examples)
    @given(products())
    def run(case):
        held(case, fired)

    run()
    assert fired["fused"] >= 3 and fired["near_miss"] >= 3, fired
