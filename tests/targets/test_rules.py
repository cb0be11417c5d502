"""Every rule of the legality model: a kernel that breaks it is found, at its line; its near miss is not."""

import pytest

pytest.importorskip("triton")
from gcu_compile.targets.legality import check_kernel, check_ttir, ttir_of
from gcu_compile.targets.legality.rules import RULES, SEVERITIES, rule
from gcu_compile.targets.profile import load_profile

from .corpus import addresses, compute, launch, masks, patterns, types

MODULES = (types, addresses, masks, patterns, compute, launch)
CASES = [case for module in MODULES for case in module.CASES]
NAMES = [f"{case.rule}-{case.breaks.name}-{case.target}" for case in CASES]
# Findings about the launch or the whole kernel, which belong to no line.
NO_LINE = {"grid", "warps", "stages", "l1-bytes", "l1-pingpong", "l2-bytes", "compiles"}
# What Triton's front end lets no kernel do; tested below on a smaller limit and on TTIR written by hand.
BY_HAND = {"tile-dim", "dot-dtype"}
MIXED = """module {
  tt.func public @mixed(%x: !tt.ptr<f32>) {
    %a = arith.constant dense<1.0> : tensor<128x64xbf16>
    %b = arith.constant dense<1.0> : tensor<64x128xf16>
    %c = arith.constant dense<0.0> : tensor<128x128xf32>
    %d = tt.dot %a, %b, %c : tensor<128x64xbf16> * tensor<64x128xf16> -> tensor<128x128xf32>
    tt.return
  }
}
"""


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_kernel_that_breaks_the_rule_is_found(case):
    report = check_kernel(case.breaks, load_profile(case.target))
    found = [finding for finding in report.findings if finding.rule == case.rule]
    if case.breaks.kernel is addresses.maximum_in_disguise and not found:
        assert "arith.maxsi" not in ttir_of(case.breaks, load_profile(case.target))
        pytest.skip("this Triton (3.6) does not fold a select into a maximum")
    assert found, [f.rule for f in report.findings]
    severity = rule(case.rule).severity_on(case.target)
    assert {f.severity for f in found} == {severity}
    assert report.legal is not any(f.severity in ("abort", "error") for f in report.findings)
    assert severity not in ("abort", "error") or not report.legal
    for finding in found:
        assert finding.message and finding.remedy and finding.source
        if case.rule not in NO_LINE and finding.operation:
            assert finding.file.endswith(".py") and finding.line > 0


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_its_near_miss_is_not(case):
    report = check_kernel(case.keeps, load_profile(case.target))
    assert case.rule not in [finding.rule for finding in report.findings]
    assert report.legal, [(f.rule, f.message) for f in report.findings]


def test_every_rule_has_a_pair():
    assert {case.rule for case in CASES} | BY_HAND == set(RULES)


def test_rules_are_well_formed():
    for entry in RULES.values():
        assert entry.severity in SEVERITIES and entry.says and entry.remedy and len(entry.source) > 3, entry.id
        assert all(target in ("gcu300", "gcu400") for target in entry.on)


def test_a_tile_dimension_beyond_the_dma_engine():
    """`tile-dim` by a profile with a smaller limit, which a kernel can reach."""
    profile = load_profile("gcu400")
    small = profile.model_copy(update={"tile_dim_max": profile.tile_dim_max.model_copy(update={"value": 128})})
    case = next(case for case in CASES if case.rule == "no-64-bit-values")
    assert "tile-dim" in [f.rule for f in check_kernel(case.keeps, small).findings]
    assert "tile-dim" not in [f.rule for f in check_kernel(case.keeps, profile).findings]


def test_dot_operands_of_two_types():
    profile = load_profile("gcu300")
    (finding,) = [f for f in check_ttir(MIXED, profile).findings if f.rule == "dot-dtype"]
    assert finding.severity == "error" and "bf16 and f16" in finding.message
    assert "dot-dtype" not in [f.rule for f in check_ttir(MIXED.replace("xf16", "xbf16"), profile).findings]


def test_the_line_is_the_one_in_the_source():
    import inspect

    kernel = addresses.clamp_by_maximum
    case = next(case for case in CASES if case.breaks.name == kernel.__name__)
    report = check_kernel(case.breaks, load_profile("gcu300"))
    (finding,) = [f for f in report.findings if f.rule == "address-abort"]
    lines, first = inspect.getsourcelines(kernel.fn)
    assert "tl.maximum" in lines[finding.line - first]
