"""Every kernel of `kernels/triton` against the rules of both cards, and through Triton's CUDA backend to a cubin."""

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")
from gcu_compile.kernels import triton as package
from gcu_compile.kernels.triton.configs import _table, configs
from gcu_compile.targets.legality import Specimen, check_kernel
from gcu_compile.targets.profile import load_profile
from gcu_compile.targets.triton_private import compile_for_cuda, compile_ttir, is_kernel

MODULES = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.endswith("_kernel"))
# Share of a kernel's bytes, per pass over its tiles, that move as DMA slices unless its file's GATHERS says why not.
LEAST_SLICED = 0.9


def module(name):
    return importlib.import_module(f"gcu_compile.kernels.triton.{name}")


SPECIMENS = {f"{name}: {entry['name']}": entry for name in MODULES for entry in module(name).LEGALITY_SPECIMENS}
OTHERS = {f"{n}: {entry['name']}": entry for n in MODULES for entry in getattr(module(n), "NOT_ON_GCU300", [])}


def sliced_share(report):
    """Bytes of slices, and of all tile accesses, of one execution of each access."""
    size = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4}
    moved = {"dma slice": 0, "gather": 0}
    for access in report.accesses:
        count = size[access.element]
        for n in access.shape:
            count *= n
        if access.verdict in moved:
            moved[access.verdict] += count
    total = sum(moved.values())
    return (moved["dma slice"] / total if total else 1.0), total


@pytest.mark.parametrize("target", ["gcu300", "gcu400"])
@pytest.mark.parametrize("name", SPECIMENS)
def test_kernel_is_legal_and_moves_slices(name, target):
    report = check_kernel(Specimen.of(SPECIMENS[name]), load_profile(target))
    bad = [f"{f.rule} at line {f.line}: {f.message}" for f in report.findings if f.severity in ("abort", "error")]
    assert not bad
    assert not any(finding.rule == "l1-pingpong" for finding in report.findings)
    share, total = sliced_share(report)
    print(f"{name} on {target}: {share:.1%} of {total} bytes of tiles as DMA slices")
    for access in report.accesses:
        if access.verdict == "gather":
            print(f"  gather, line {access.line}: {', '.join(access.reasons)}")
    reasons = getattr(module(name.split(": ")[0]), "GATHERS", {})
    why = reasons.get(SPECIMENS[name]["name"])
    # What gathers says why in its file, and what says so gathers.
    assert (share < LEAST_SLICED) == bool(why), why


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_kept_from_gcu300_is_legal_on_gcu400_alone(name):
    legal = {t: check_kernel(Specimen.of(OTHERS[name]), load_profile(t)).legal for t in ("gcu300", "gcu400")}
    assert legal == {"gcu300": False, "gcu400": True}


@pytest.mark.parametrize("name", MODULES)
def test_every_kernel_has_a_specimen(name):
    kernels = {k for k in vars(module(name)).values() if is_kernel(k) and k.__name__.endswith("_kernel")}
    assert kernels
    assert kernels <= {entry["kernel"] for entry in module(name).LEGALITY_SPECIMENS}


def first_of_each_kernel():
    """Compilers take seconds: by default the first specimen of each kernel, with --slow all of them."""
    seen = set()
    for name, entry in (SPECIMENS | OTHERS).items():
        yield pytest.param(name, marks=[pytest.mark.slow] if entry["kernel"] in seen and name not in OTHERS else [])
        seen.add(entry["kernel"])


@pytest.mark.parametrize("name", first_of_each_kernel())
def test_sizes_of_one_are_compiled_into_the_kernel_without_64_bits(name):
    """Triton makes a constant of an integer argument that is 1; some kernels fail to compile then, or widen."""
    entry = (SPECIMENS | OTHERS)[name]
    sizes = {argument: 1 for argument, kind in entry["signature"].items() if kind == "i32"}
    others = {argument: kind for argument, kind in entry["signature"].items() if argument not in sizes}
    assert "i64" not in compile_ttir(entry["kernel"], others, entry["constexprs"] | sizes)


@pytest.mark.parametrize("name", first_of_each_kernel())
def test_compiles_ahead_of_time_for_sm_90(name):
    file, _ = name.split(": ")
    entry = (SPECIMENS | OTHERS)[name]
    for_cuda = getattr(module(file), "for_cuda", lambda constexprs: constexprs)
    config = configs(getattr(module(file), "CONFIG", file.removesuffix("_kernel")), "cuda")[0]
    exact = getattr(module(file), "EXACT", False)
    options = {"enable_fp_fusion": False} if exact else {}
    asm = compile_for_cuda(
        entry["kernel"],
        entry["signature"],
        for_cuda(entry["constexprs"]),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    assert asm["cubin"][:4] == b"\x7fELF" and ".target sm_90" in asm["ptx"]
    # Exact arithmetic needs products to be rounded before they are added.
    assert not exact or "fma.rn.f32" not in asm["ptx"]


@pytest.mark.parametrize("kernel", _table())
def test_every_configuration_is_one_the_card_takes(kernel):
    for target in ("gcu300", "gcu400"):
        profile = load_profile(target)
        for config in configs(kernel, target):
            assert config.num_warps <= profile.value("max_warps") and config.num_warps & (config.num_warps - 1) == 0
            sizes = [size for name, size in config.tile.items() if name != "PROGRAMS"]
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
