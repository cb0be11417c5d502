"""`gcu::rejection_sample`: accepted, recovered and bonus tokens; the C++ kernel against the float64 meaning."""

import numpy as np
import pytest
import torch
from test_sample import DTYPES, KINDS, check_chi_square, logits

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.sampling import REJECTION_SAMPLE, eager, has_values, rejection_eager


def case(kind, vocab, dtype, seed, counts=(3, 0, 1, 2)):
    """Drafts of four requests; some are what the target would say, some are not."""
    drafts, generator = sum(counts), torch.Generator().manual_seed(seed)
    x = logits(kind, max(1, drafts), vocab, dtype, seed)[:drafts]
    offsets = torch.tensor([0, *np.cumsum(counts)])
    q = (torch.randn(drafts, vocab, generator=generator) * 2).softmax(-1)
    likely = x.float().nan_to_num(nan=-torch.inf).argmax(-1)
    ids = torch.where(torch.rand(drafts, generator=generator) < 0.6, likely, q.argmax(-1))
    asked = {"temperature": torch.tensor([0.0, 0.7, 1.0, 1.5, 1.0, 1e-6])[:drafts]}
    asked["top_p"] = torch.tensor([0.9, 0.95, 1.0, 0.5, 0.99, 0.9])[:drafts]
    asked["top_k"] = torch.tensor([0, 50, 7, 0, vocab, 3], dtype=torch.int32)[:drafts]
    numbers = torch.arange(drafts) + seed, torch.arange(drafts) * 5
    return (x, ids, offsets, torch.arange(len(counts)) + 1, *numbers, max(counts)), q, asked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 97, 4099, 20011])
@pytest.mark.parametrize("with_probabilities", [False, True])
def test_kernel_equals_the_meaning(vocab, dtype, with_probabilities):
    for kind in KINDS:
        for seed in range(3 if vocab < 5000 else 1):
            arguments, q, asked = case(kind, vocab, dtype, seed)
            q = q if with_probabilities else None
            before = registry.calls["rejection_sample", "host_cpp"]
            got = torch.ops.gcu.rejection_sample(*arguments, q, **asked)
            assert registry.calls["rejection_sample", "host_cpp"] == before + 1
            expected = REJECTION_SAMPLE.eager(*arguments, q, **asked)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_without_probabilities_a_seed_gives_the_tokens_of_plain_decoding():
    (x, ids, offsets, bonus, seeds, positions, length), _, asked = case("normal", 4099, torch.bfloat16, 3)
    plain = torch.ops.gcu.sample(x, seeds, positions, **asked)
    ids = plain.clone()
    ids[1] += 1  # the second draft of the first request is wrong
    got = torch.ops.gcu.rejection_sample(x, ids, offsets, bonus, seeds, positions, length, **asked)
    assert got.tolist() == [
        [plain[0], plain[1], -1, -1],
        [bonus[1], -1, -1, -1],
        [plain[3], bonus[2], -1, -1],
        [plain[4], plain[5], bonus[3], -1],
    ]


def test_greedy_rows_accept_the_maximum_whatever_the_draft_thought():
    x = torch.tensor([[0.0, 2.0, 1.0]] * 2)
    q = torch.tensor([[0.0, 0.0, 1.0]] * 2)
    zero, offsets = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2])
    arguments = (x, torch.tensor([1, 2]), offsets, torch.tensor([0]), zero, zero, 2, q)
    assert torch.ops.gcu.rejection_sample(*arguments, torch.zeros(2)).tolist() == [[1, 1, -1]]
    assert torch.ops.gcu.rejection_sample(*arguments).tolist() == [[1, 1, -1]]


@pytest.mark.parametrize("with_probabilities", [False, True])
def test_what_comes_out_is_distributed_as_the_target(with_probabilities):
    """100 000 verifications of a draft that is itself drawn from q: chi-square against p."""
    n, vocab = 100_000, 23
    x = logits("normal", 1, vocab, torch.bfloat16, 1)
    q = (torch.randn(1, vocab, generator=torch.Generator().manual_seed(5)) * 1.5).softmax(-1)
    asked = {"temperature": torch.full((n,), 0.8), "top_k": torch.full((n,), 12, dtype=torch.int32)}
    drafts = torch.multinomial(q[0], n, replacement=True, generator=torch.Generator().manual_seed(6))
    kept, weights = eager.kept_set(eager.adjusted(x), **{name: value[:1] for name, value in asked.items()})
    offsets = torch.arange(n + 1)
    got = torch.ops.gcu.rejection_sample(
        x.expand(n, vocab),
        drafts if with_probabilities else torch.full((n,), 3),
        offsets,
        torch.zeros(n, dtype=torch.int64),
        torch.full((n,), 42),
        torch.arange(n),
        1,
        q.expand(n, vocab).contiguous() if with_probabilities else None,
        **asked,
    )
    check_chi_square(got[:, 0], (weights * kept / (weights * kept).sum())[0].numpy())


def test_values_on_a_device_are_not_read():
    """A check that waited for a device would stall every step; values are looked at on the host alone."""
    assert has_values(torch.zeros(1)) and not has_values(torch.zeros(1, device="meta"))
    arguments, _, asked = case("normal", 97, torch.float32, 1)
    device = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments]
    probabilities = torch.zeros_like(device[0])
    got = REJECTION_SAMPLE.eager(*device, probabilities, **{name: value.to("meta") for name, value in asked.items()})
    assert got.shape == (4, 4)  # a meta tensor refuses to be read


def test_no_drafts_at_all_is_bonus_tokens_only():
    none = torch.zeros(0, dtype=torch.int64)
    got = torch.ops.gcu.rejection_sample(
        torch.zeros(0, 5), none, torch.zeros(3, dtype=torch.int64), torch.tensor([4, 2]), none, none, 0
    )
    assert got.tolist() == [[4], [2]]


def test_tokens_end_with_the_first_that_is_not_its_draft():
    found, drafts = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 9, 3, 4])
    got = rejection_eager.assemble(found, drafts, torch.tensor([0, 3, 4]), torch.tensor([7, 8]), 3)
    assert got.tolist() == [[1, 2, -1, -1], [4, 8, -1, -1]]


def test_operation_is_compiled_through():
    arguments, q, asked = case("normal", 97, torch.float32, 1)
    x, *rest = arguments

    def run(y):
        return torch.ops.gcu.rejection_sample(y * 2, *rest, q, **asked)

    torch.testing.assert_close(torch.compile(run, backend="gcu")(x), run(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (1, torch.zeros(2, dtype=torch.int64), r"draft_ids is \(2,\), expected \[6\]"),
        (1, torch.full((6,), 97), "draft_ids leave the vocabulary of 97"),
        (2, torch.tensor([0, 3, 2, 4, 6]), "do not cut 6 drafts into requests of up to 3"),
        (2, torch.tensor([0, 4, 4, 4, 6]), "do not cut 6 drafts into requests of up to 3"),
        (3, torch.zeros(2, dtype=torch.int64), "do not fit together"),
    ],
)
def test_bad_drafts_are_named(at, value, message):
    arguments, q, asked = case("normal", 97, torch.float32, 1)
    arguments = [*arguments[:at], value, *arguments[at + 1 :]]
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.gcu.rejection_sample(*arguments, **asked)
    with pytest.raises(InvalidInputError, match=r"draft_probabilities is \(6, 5\)"):
        torch.ops.gcu.rejection_sample(*case("normal", 97, torch.float32, 1)[0], q[:, :5], **asked)
