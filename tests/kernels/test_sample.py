"""`gcu::sample`: the C++ kernel keeps and draws exactly what the sorted float64 meaning says."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcu_compile.errors import InvalidInputError, KernelBuildError
from gcu_compile.kernels import registry
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host import sample as host
from gcu_compile.kernels.sampling import eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "peaked", "flat", "equal", "tied", "masked", "one", "nan", "infinite", "zeros"]
VOCABULARIES = [2, 3, 17, 97, 1000, 4096, 4099, 8191, 20011]
LARGE = [49152, 151936, 262144]
ISAS = ["portable", "avx2", "avx512", "amx"]


def logits(kind, rows, vocab, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=generator) * (0.01, 1, 4)[seed % 3]
    hit = torch.rand(rows, vocab, generator=generator)
    one = int(hit[0, 0] * vocab)
    match kind:
        case "peaked":
            x[:, one] += 20
        case "flat":
            x *= 1e-3
        case "equal":
            x.fill_(0.5)
        case "tied":
            x = (x * 2).round() / 2
        case "masked":
            x[hit < 0.7] = -torch.inf
        case "one":
            x.fill_(-torch.inf)[:, one] = 1.0
        case "nan":
            x[hit < 0.1] = torch.nan
        case "infinite":
            x[hit < 0.01] = torch.inf
        case "zeros":
            x = torch.where(hit < 0.5, 0.0, -0.0)
    return x.to(dtype)


def check(x, seeds, positions, **asked):
    """The kernel's kept set and draw against the meaning's."""
    assert host.refuses(x) is None
    kept = torch.zeros(x.shape, dtype=torch.bool)
    ids = host.run(x, kept=kept, seeds=seeds, positions=positions, **asked)
    z = eager.adjusted(x, **{k: v for k, v in asked.items() if k not in ("temperature", "top_k", "top_p", "min_p")})
    chain = {k: v for k, v in asked.items() if k in ("temperature", "top_k", "top_p", "min_p")}
    expected, _ = eager.kept_set(z, **chain)
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    torch.testing.assert_close(ids, eager.sample(x, seeds, positions, **asked), rtol=0, atol=0)
    assert bool(((ids >= 0) & (ids < x.shape[1])).all())
    return ids


@st.composite
def chains(draw, vocabularies=VOCABULARIES):
    rows, vocab = draw(st.integers(1, 4)), draw(st.sampled_from(vocabularies))
    x = logits(draw(st.sampled_from(KINDS)), rows, vocab, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))

    def row(values, dtype=torch.float32):
        return torch.tensor([draw(st.sampled_from(values)) for _ in range(rows)], dtype=dtype)

    asked = {"temperature": row([0.0, 0.3, 1.0, 2.0])}
    if draw(st.booleans()):
        asked["top_p"] = row([1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0])
    if draw(st.booleans()):
        asked["top_k"] = row([0, 1, 2, 7, 50, 5000, vocab // 2, vocab - 1, vocab], torch.int32)
    if draw(st.booleans()):
        asked["min_p"] = row([0.0, 1e-4, 0.01, 0.5, 1.0])
    return x, asked, draw(st.integers(0, 2**62))


def numbers(rows, seed):
    return torch.arange(rows) + seed, torch.arange(rows) * 3


@settings(max_examples=300, deadline=None, derandomize=True)
@given(chains())
def test_kept_set_and_draw_equal_the_meaning(case):
    x, asked, seed = case
    check(x, *numbers(len(x), seed), **asked)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(chains(LARGE))
def test_large_vocabularies(case):
    x, asked, seed = case
    check(x, *numbers(len(x), seed), **asked)


@pytest.mark.slow
@settings(max_examples=6000, deadline=None)
@given(chains())
def test_long_sweep(case):
    x, asked, seed = case
    check(x, *numbers(len(x), seed), **asked)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(chains(LARGE))
def test_long_sweep_of_large_vocabularies(case):
    x, asked, seed = case
    check(x, *numbers(len(x), seed), **asked)


def available(isa, monkeypatch):
    """Sets the option; whether this CPU has it. The option refuses what it lacks."""
    has = isa in build.available()
    monkeypatch.setenv("GCU_COMPILE_HOST_ISA", isa)
    if not has:
        with pytest.raises(KernelBuildError, match="not available on this CPU"):
            build.host_isa()
    return has


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_tokens(isa, monkeypatch):
    if not available(isa, monkeypatch):
        return
    for kind in KINDS:
        for dtype in DTYPES:
            x = logits(kind, 3, 20011, dtype, 5)
            check(x, *numbers(3, 7), temperature=torch.tensor([0.0, 1.0, 0.5]), top_p=torch.full((3,), 0.9))
        check(x, *numbers(3, 7), temperature=torch.ones(3), top_k=torch.tensor([3, 50, 9000], dtype=torch.int32))


def lists(rows, vocab, seed, dtype):
    """Offsets and ascending unique ids of random length per row, and values."""
    source = np.random.default_rng(seed)
    ids = [np.sort(source.choice(vocab, source.integers(0, min(vocab, 60)), replace=False)) for _ in range(rows)]
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in ids])])
    flat = torch.from_numpy(np.concatenate(ids).astype(np.int32))
    values = source.normal(size=len(flat)) if dtype == torch.float32 else source.integers(0, 4, len(flat))
    return offsets, flat, torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [97, 4099, 49152])
def test_mask_bias_and_penalties(dtype, vocab):
    rows = 4
    x = logits("normal", rows, vocab, dtype, 1)
    asked = {"temperature": torch.tensor([0.0, 1.0, 0.7, 1.5]), "top_p": torch.full((rows,), 0.95)}
    asked["forbidden"] = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(2)) < 0.3
    for kind, name, kind_dtype in (("bias", "values", torch.float32), ("history", "counts", torch.int32)):
        offsets, ids, values = lists(rows, vocab, 3, kind_dtype)
        asked |= {f"{kind}_offsets": offsets, f"{kind}_ids": ids, f"{kind}_{name}": values}
    asked["bias_values"][::5] = -torch.inf
    asked |= {
        "repetition": torch.tensor([1.0, 1.3, 0.8, 2.0]),
        "frequency": torch.tensor([0.0, 0.5, -0.5, 1.0]),
        "presence": torch.tensor([0.0, 0.2, -1.0, 1.0]),
    }
    for seed in range(20):
        check(x, *numbers(rows, seed), **asked)


def test_same_seed_same_token_in_any_batch_and_order():
    x = logits("normal", 8, 20011, torch.bfloat16, 4)
    seeds, positions = torch.arange(8) + 100, torch.arange(8) + 5
    asked = {"temperature": torch.full((8,), 1.2), "top_p": torch.full((8,), 0.9)}
    whole = host.run(x, seeds=seeds, positions=positions, **asked)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = host.run(
        x[order].contiguous(), seeds=seeds[order], positions=positions[order], **{k: v[order] for k, v in asked.items()}
    )
    assert torch.equal(shuffled, whole[order])
    for row in range(8):
        one = slice(row, row + 1)
        alone = host.run(x[one], seeds=seeds[one], positions=positions[one], **{k: v[one] for k, v in asked.items()})
        assert alone.item() == whole[row]


def test_random_numbers_are_philox():
    # Counter 0, key 0: the first known answer of Random123's philox4x32-10 (kat_vectors: 6627e8d5 e169c58d ...).
    expected = ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) * 2.0**-53
    assert eager.uniform(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).item() == expected


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"top_k": torch.tensor([5], dtype=torch.int32)},
        {"top_p": torch.tensor([0.7])},
        {"min_p": torch.tensor([0.2])},
    ],
    ids=["all", "top_k", "top_p", "min_p"],
)
def test_chi_square_of_100000_draws(asked):
    n, vocab = 100_000, 23
    x = logits("normal", 1, vocab, torch.bfloat16, 1)
    one = {"temperature": torch.ones(1), **asked}
    kept, weights = eager.kept_set(eager.adjusted(x), **one)
    probability = (weights * kept / (weights * kept).sum())[0].numpy()
    ids = host.run(
        x.expand(n, vocab),
        seeds=torch.full((n,), 42),
        positions=torch.arange(n),
        **{k: v.expand(n) for k, v in one.items()},
    )
    check_chi_square(ids, probability)


def check_chi_square(ids, probability):
    """Draws against their distribution. A fixed seed makes this a test of the code, not of luck."""
    n = len(ids)
    counts = np.bincount(ids.numpy(), minlength=len(probability))
    assert counts[probability == 0].sum() == 0
    support = probability > 0
    statistic = ((counts[support] - n * probability[support]) ** 2 / (n * probability[support])).sum()
    freedom = support.sum() - 1
    # Wilson-Hilferty: chi-square's 99.99 % point.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * np.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_operation_is_compiled_through_and_counted():
    x = logits("normal", 2, 97, torch.float32, 2)
    seeds, positions = numbers(2, 1)
    before = registry.calls["sample", "host_cpp"]
    fn = torch.compile(lambda y: torch.ops.gcu.sample(y * 2, seeds, positions, torch.ones(2)), backend="gcu")
    assert torch.equal(fn(x), eager.sample(x * 2, seeds, positions, torch.ones(2)))
    assert registry.calls["sample", "host_cpp"] == before + 1


def test_float64_logits_fall_back_and_say_so():
    registry.fallbacks.clear()
    x = logits("normal", 2, 97, torch.float64, 2)
    torch.ops.gcu.sample(x, *numbers(2, 1), torch.ones(2))
    ((name, reason),) = registry.fallbacks
    assert name == "sample" and "torch.float64" in reason


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"top_p": torch.ones(3)}, r"top_p is \(3,\), expected \[2\]"),
        ({"forbidden": torch.zeros(2, 5, dtype=torch.bool)}, r"forbidden is \(2, 5\)"),
        ({"history_offsets": torch.zeros(3, dtype=torch.int64)}, "needs repetition, frequency and presence"),
        (
            {
                "bias_offsets": torch.tensor([0, 1, 1]),
                "bias_ids": torch.tensor([97], dtype=torch.int32),
                "bias_values": torch.ones(1),
            },
            "leave the vocabulary of 97",
        ),
        (
            {
                "bias_offsets": torch.tensor([0, 2, 1]),
                "bias_ids": torch.tensor([1], dtype=torch.int32),
                "bias_values": torch.ones(1),
            },
            "do not cut bias_ids",
        ),
        (
            {
                "bias_offsets": torch.tensor([0, 2, 4]),
                "bias_ids": torch.tensor([3, 5, 4, 2], dtype=torch.int32),
                "bias_values": torch.ones(4),
            },
            "bias_ids do not ascend within a row",
        ),
        (
            {
                "history_offsets": torch.tensor([0, 0, 2]),
                "history_ids": torch.tensor([7, 7], dtype=torch.int32),
                "history_counts": torch.ones(2, dtype=torch.int32),
                **dict.fromkeys(("repetition", "frequency", "presence"), torch.ones(2)),
            },
            "history_ids do not ascend within a row, each once",
        ),
    ],
)
def test_bad_arguments_are_named(asked, message):
    x = logits("normal", 2, 97, torch.float32, 2)
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.gcu.sample(x, *numbers(2, 1), temperature=torch.ones(2), **asked)
    with pytest.raises(InvalidInputError, match=message):  # the same from the meaning in plain torch
        torch.ops.gcu.sample(x.double(), *numbers(2, 1), temperature=torch.ones(2), **asked)


def test_a_token_may_have_several_biases_and_rows_begin_anew():
    x, lists = logits("normal", 3, 97, torch.float32, 2), {"bias_offsets": torch.tensor([0, 3, 3, 5])}
    lists["bias_ids"] = torch.tensor([5, 5, 90, 0, 5], dtype=torch.int32)
    lists["bias_values"] = torch.tensor([1.0, 2.0, -1.0, 0.5, 9.0])
    asked = {"temperature": torch.ones(3), **lists}
    assert torch.equal(torch.ops.gcu.sample(x, *numbers(3, 1), **asked), eager.sample(x, *numbers(3, 1), **asked))


MEMORY = """
import torch
from gcu_compile.kernels.host import sample as host

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

rows, vocab = 32, 151936
x = torch.randn(rows, vocab).bfloat16()
seeds = torch.arange(rows)
asked = dict(temperature=torch.ones(rows), top_p=torch.full((rows,), 0.9))
host.run(x[:, :64].contiguous(), seeds=seeds, positions=seeds)  # loads the library; its scratch is not touched yet
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
host.run(x, seeds=seeds, positions=seeds, **asked)
print((resident("VmHWM") - before) / x.nbytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_extra_memory_is_within_two_percent_of_the_logits():
    """Measured in a fresh process with the threads of this machine, 2 and more: half of the limit is one's own."""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 0.02, result.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_float32_weights_keep_their_proven_error(isa, monkeypatch):
    """The comparisons of masses rest on Weights::ERROR; to a common factor, which the largest weight shows."""
    if not available(isa, monkeypatch):
        return
    error = float((build.HERE / "sampling" / "weights.h").read_text().split("double ERROR = ")[1].split(";")[0])
    library = build.load("sample")
    for maximum, temperature in ((0, 1), (13.25, 1), (100, 0.1), (-50, 2), (3, 1e-3), (3000, 7), (-30, 0.7)):
        z = (torch.linspace(0, -80, 1 << 18, dtype=torch.float64) * temperature + maximum).float()
        narrow, exact = torch.empty(len(z), dtype=torch.float64), torch.empty(len(z), dtype=torch.float64)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (z, narrow, exact))
        scalars = len(z), ctypes.c_float(maximum), ctypes.c_float(temperature)
        library.gcu_sample_weights(next(pointers), *scalars, *pointers)
        t = torch.tensor(temperature, dtype=torch.float32).double()
        truth = ((z.double() - maximum) / t).exp()
        assert ((exact / truth - 1).abs() < 2**-44).all()
        ratio = narrow / truth
        assert ((ratio / ratio.median() - 1).abs() < error).all()
