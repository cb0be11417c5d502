"""`gcu-compile check`: what it prints, what it writes, and its exit status for CI."""

import json
import textwrap

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")
from gcu_compile.cli.main import app
from gcu_compile.errors import GcuCompileError

KERNELS = """
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x, y, n, B: tl.constexpr):
        i = tl.program_id(0) * B + tl.arange(0, B)
        tl.store(y + i, tl.load(x + i, i < n), i < n)

    @triton.jit
    def reverse(x, y, n, B: tl.constexpr):
        i = tl.arange(0, B)
        tl.store(y + i, tl.load(x + (n - 1 - i)))

    @triton.jit
    def clamp(x, y, n, B: tl.constexpr):
        i = tl.arange(0, B)
        tl.store(y + i, tl.load(x + tl.maximum(i - 1, 0)))
"""
COPY = '{"kernel": copy, "signature": {"x": "*fp32", "y": "*fp32", "n": "i32"}, "constexprs": {"B": 256}}'


def check(tmp_path, specimens, *words):
    file = tmp_path / "kernels.py"
    file.write_text(textwrap.dedent(KERNELS) + (f"\nLEGALITY_SPECIMENS = [{specimens}]\n" if specimens else ""))
    out = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["check", str(file), "--json", str(out), *words])
    return result, json.loads(out.read_text()) if out.exists() else None


def test_a_legal_kernel_is_status_0(tmp_path):
    result, report = check(tmp_path, COPY)
    assert result.exit_code == 0 and report["legal"] and report["checked"] == 1
    (kernel,) = report["files"][0]["kernels"]
    assert [a["verdict"] for a in kernel["accesses"]] == ["dma slice", "dma slice"]
    assert kernel["cost"]["microseconds"] > 0 and "dma slice" in result.stdout
    # Kernels that nothing launches are named, not passed over.
    assert report["files"][0]["not_checked"] == ["clamp", "reverse"]
    assert "2 kernels not checked" in result.stdout
    assert check(tmp_path, COPY, "--strict")[0].exit_code == 1


def test_a_slow_kernel_is_status_0_and_says_why(tmp_path):
    result, report = check(tmp_path, COPY.replace("copy", "reverse"))
    assert result.exit_code == 0 and report["legal"]
    assert "address-gather" in [f["rule"] for f in report["files"][0]["kernels"][0]["findings"]]


def test_an_aborting_kernel_is_status_1(tmp_path):
    result, report = check(tmp_path, f"{COPY}, {COPY.replace('copy', 'clamp')}")
    assert result.exit_code == 1 and not report["legal"] and report["checked"] == 2
    finding = report["files"][0]["kernels"][1]["findings"][0]
    assert finding["rule"] == "address-abort" and finding["severity"] == "abort" and finding["line"] > 0
    assert "not legal on gcu300" in result.stdout


def test_one_kernel_may_be_refused_by_one_card_only(tmp_path):
    fp8 = COPY.replace("*fp32", "*fp8e5")
    assert check(tmp_path, fp8)[0].exit_code == 1
    assert check(tmp_path, fp8, "--target", "gcu400")[0].exit_code == 0


@pytest.mark.parametrize(
    ("specimens", "words", "message"),
    [
        ("", [], "nothing to check"),
        ('{"kernal": copy}', [], "Did you mean 'kernel'"),
        (COPY.replace('"n": "i32"', '"m": "i32"'), [], "argument of copy"),
        (COPY, ["--target", "gcu30"], "Did you mean 'gcu300'"),
    ],
)
def test_what_cannot_be_checked_is_refused(tmp_path, specimens, words, message):
    result, _ = check(tmp_path, specimens, *words)
    assert isinstance(result.exception, GcuCompileError) and message in str(result.exception)


def test_a_folder_is_checked_whole(tmp_path):
    (tmp_path / "deep").mkdir()
    check(tmp_path, COPY)
    (tmp_path / "kernels.py").rename(tmp_path / "deep" / "kernels.py")
    (tmp_path / "plain.py").write_text("x = 1\n")
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 0 and "1 specimens in 1 files" in result.stdout


def test_an_override_of_a_fact_changes_the_verdict(tmp_path):
    (tmp_path / "mine.yaml").write_text("refuses_64_bit: false\nmax_warps: 2\n")
    result, report = check(tmp_path, COPY, "--profile", str(tmp_path / "mine.yaml"))
    assert result.exit_code == 1
    assert "warps" in [f["rule"] for f in report["files"][0]["kernels"][0]["findings"]]


SHARED = """
    import triton
    import triton.language as tl

    @triton.jit
    def twice(x):
        return x + x

    @triton.jit
    def four_times(x):
        return twice(twice(x))

    @triton.jit
    def forgotten(x):
        return x * 3
"""
CALLER = """
    import shared
    import triton
    import triton.language as tl

    @triton.jit
    def scale(x, y, B: tl.constexpr):
        i = tl.arange(0, B)
        tl.store(y + i, shared.four_times(tl.load(x + i)))

    LEGALITY_SPECIMENS = [
        {"kernel": scale, "signature": {"x": "*fp32", "y": "*fp32"}, "constexprs": {"B": 64}, "name": "scale 64"}
    ]
"""


@pytest.mark.parametrize("by_name", [False, True])
def test_device_functions_are_checked_inside_what_calls_them(tmp_path, by_name):
    module = f"shared_{int(by_name)}"  # a module of its own: Python keeps the first of a name
    text = textwrap.dedent(CALLER).replace("shared", module)
    if by_name:
        text = text.replace(f"import {module}\n", f"from {module} import four_times\n").replace(
            f"{module}.four", "four"
        )
    (tmp_path / "scaling.py").write_text(text)
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(SHARED))
    out = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["check", str(tmp_path), "--json", str(out)])
    assert result.exit_code == 0, result.stdout
    files = {entry["file"].rsplit("/", 1)[1]: entry for entry in json.loads(out.read_text())["files"]}
    assert files[f"{module}.py"]["checked_within"] == {"four_times": ["scale"], "twice": ["scale"]}
    assert files[f"{module}.py"]["not_checked"] == ["forgotten"] and not files["scaling.py"]["not_checked"]
    assert "checked inside scale: four_times, twice." in result.stdout
