"""Public-style kernels: the verdict on every access, judged right."""

import pytest

pytest.importorskip("triton")
from gcu_compile.targets.legality import check_kernel, ttir_of
from gcu_compile.targets.profile import load_profile

from .corpus.public import CASES, VERDICTS

S60 = load_profile("gcu300")


def rules(name):
    specimen = next(specimen for specimen, _, _ in CASES if specimen.name == name)
    return {f.rule for f in check_kernel(specimen, S60).findings if f.severity in ("abort", "error")}


@pytest.mark.parametrize(("specimen", "verdicts", "legal"), CASES, ids=[case[0].name for case in CASES])
def test_every_access_is_judged_right(specimen, verdicts, legal):
    report = check_kernel(specimen, S60)
    if "matmul_block_pointers" in specimen.name and any("have been removed" in f.message for f in report.findings):
        pytest.skip("this Triton has no block pointers (3.6, which a card has today, does)")
    if "matmul_block_pointers" in specimen.name and "tt.make_tensor_ptr" not in ttir_of(specimen, S60):
        # Triton 3.8 writes them out as 64-bit addresses, which the card's compiler does not survive.
        assert "no-64-bit-index" in rules(specimen.name)
        return
    assert [access.verdict for access in report.accesses] == [VERDICTS[letter] for letter in verdicts]
    assert report.legal is legal, [(f.rule, f.message) for f in report.findings]


def test_why_the_illegal_ones_are_so():
    assert rules("flash_attention") == {"transposed-tile"}
    assert rules("shuffled_rows") == {"address-abort"}
    assert rules("dropout_hash") == {"no-64-bit-values"}
