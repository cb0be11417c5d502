"""`gcu::sample` for arguments like those that were looked at before: the same tokens, errors and reports."""

import importlib.util
import threading

import pytest
import torch
from test_sample import available, lists, logits, numbers
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gcu_compile.debug import shadow
from gcu_compile.errors import InvalidInputError, KernelBuildError
from gcu_compile.kernels import direct, registry
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host import sample as host
from gcu_compile.kernels.sampling import eager, known

HAS_PLACE = importlib.util.find_spec("torch._inductor.codegen.custom_extern_kernel_codegen") is not None
WAYS = {"direct": direct.sample, "torch.ops": torch.ops.gcu.sample.default}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(known, "_known", {first: {} for first in known._known})


def history(rows, vocab, seed):
    offsets, ids, counts = lists(rows, vocab, seed, torch.int32)
    found = {"history_offsets": offsets, "history_ids": ids, "history_counts": counts}
    return found | {name: torch.full((rows,), 1.2) for name in ("repetition", "frequency", "presence")}


def settings(name, rows, vocab, seed=0):
    found = {"temperature": torch.full((rows,), 0.9)}
    match name:
        case "top-p":
            found["top_p"] = torch.full((rows,), 0.8)
        case "top-k":
            found["top_k"] = torch.full((rows,), 7, dtype=torch.int32)
        case "all":
            offsets, ids, values = lists(rows, vocab, seed + 1, torch.float32)
            found |= {"bias_values": values, "bias_ids": ids, "bias_offsets": offsets, **history(rows, vocab, seed)}
            found |= {"min_p": torch.full((rows,), 0.01), "top_p": torch.full((rows,), 0.8)}
            found["forbidden"] = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(seed)) < 0.3
    return found


def is_short(call, monkeypatch):
    """The call's result, and whether nothing but the short way was gone."""
    with monkeypatch.context() as patch:
        seen = []
        run = host.run
        patch.setattr(host, "run", lambda *args, **kwargs: seen.append(1) or run(*args, **kwargs))
        patch.setattr(known, "_look", lambda *args: seen.append(1))
        result = call()
    return result, not seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["temperature", "top-p", "top-k", "all"])
@pytest.mark.parametrize("dtype", host.DTYPES)
def test_tokens_are_those_of_the_meaning(dtype, name, way, monkeypatch):
    for rows, vocab in ((1, 97), (3, 4099), (1, 97)):
        x = logits("normal", rows, vocab, dtype, 3)
        for seed in range(3):
            asked, where = settings(name, rows, vocab, seed), numbers(rows, seed)
            WAYS[way](x, *where, **asked)
            actual, short = is_short(lambda: WAYS[way](x.clone(), *where, **asked), monkeypatch)  # noqa: B023
            assert short
            assert torch.equal(actual, eager.sample(x, *where, **asked))


def test_forms_in_turn(monkeypatch):
    """Shapes, strides and dtypes that change from call to call, more than are kept."""
    wide = logits("normal", 9, 300, torch.float32, 1)
    cases = [wide[:rows] for rows in range(1, 10)] + [wide[:, :97], wide[:, 3:100], wide[::2], wide[:1, :97]]
    cases += [case.to(dtype) for case in cases for dtype in (torch.bfloat16, torch.float16)]
    for _ in range(2):
        for x in cases:
            for asked in (settings("temperature", len(x), 97), settings("top-p", len(x), 97)):
                for again in range(2):
                    where = numbers(len(x), again)
                    call = lambda: direct.sample(x, *where, **asked)  # noqa: B023, E731
                    result, short = is_short(call, monkeypatch)
                    assert short or not again
                    assert torch.equal(result if short else call(), eager.sample(x, *where, **asked))
    assert all(len(forms) <= known.MOST_FORMS for names in known._known.values() for forms in names.values())


def test_no_more_sets_of_settings_are_kept_than_it_says(monkeypatch):
    monkeypatch.setattr(known, "MOST_NAMES", 2)
    x = logits("normal", 2, 97, torch.float32, 1)
    for name in ("temperature", "top-p", "top-k", "all"):
        direct.sample(x, *numbers(2, 0), **settings(name, 2, 97))
        assert all(len(names) <= 2 for names in known._known.values())


def test_in_place_changes_of_form_are_seen():
    x, asked, where = logits("normal", 2, 97, torch.float32, 1), settings("top-p", 2, 97), numbers(2, 1)
    for _ in range(2):
        direct.sample(x, *where, **asked)
    asked["top_p"].data = torch.full((3,), 0.5)
    with pytest.raises(InvalidInputError, match=r"top_p is \(3,\), expected \[2\]"):
        direct.sample(x, *where, **asked)
    asked["top_p"].data = torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.equal(direct.sample(x, *where, **asked), eager.sample(x, *where, **asked))
    asked["top_p"].data = torch.tensor([1e-6, 9.0, 1.0, 9.0])[::2]
    assert torch.equal(direct.sample(x, *where, **asked), eager.sample(x, *where, **asked))


@pytest.mark.parametrize(
    "change",
    [
        lambda asked: asked | {"top_k": torch.tensor([3, 4])},
        lambda asked: asked | {"temperature": torch.tensor([1, 9, 0, 9])[::2]},
        lambda asked: asked | {"temperature": torch._neg_view(torch.tensor([-0.5, -1.0]))},
        lambda asked: asked | {"top_p": asked["temperature"]},
        lambda asked: asked | {"top_p": None},
    ],
    ids=["int64", "strided", "negated", "twice", "None"],
)
@pytest.mark.parametrize("way", WAYS)
def test_what_has_to_be_converted(change, way):
    x, where = logits("normal", 2, 97, torch.float32, 1), numbers(2, 1)
    asked = change(settings("top-p", 2, 97))
    plain = {name: value if value is None else value.resolve_neg() for name, value in asked.items()}
    for _ in range(2):
        assert torch.equal(WAYS[way](x, *where, **asked), eager.sample(x, *where, **plain))


@pytest.mark.parametrize("way", WAYS)
def test_a_view_that_negates_is_negated(way):
    x, where, asked = logits("normal", 2, 97, torch.float32, 1), numbers(2, 1), settings("top-p", 2, 97)
    WAYS[way](x, *where, **asked)
    for _ in range(2):
        assert torch.equal(WAYS[way](torch._neg_view(x), *where, **asked), eager.sample(-x, *where, **asked))


@pytest.mark.parametrize("way", WAYS)
def test_one_tensor_for_seeds_and_positions(way, monkeypatch):
    x, asked, numbers_ = logits("normal", 2, 97, torch.float32, 1), settings("top-p", 2, 97), torch.tensor([5, 9])
    for same in (True, False, True):
        positions = numbers_ if same else numbers_ + 1
        WAYS[way](x, numbers_, positions, **asked)
        actual, short = is_short(lambda: WAYS[way](x, numbers_, positions, **asked), monkeypatch)  # noqa: B023
        assert short and torch.equal(actual, eager.sample(x, numbers_, positions, **asked))


def test_lists_of_any_length_and_lists_that_are_wrong(monkeypatch):
    x, where = logits("normal", 3, 97, torch.bfloat16, 1), numbers(3, 1)
    for seed in range(9):
        asked = settings("all", 3, 97, seed)
        call = lambda: direct.sample(x, *where, **asked)  # noqa: B023, E731
        result, short = is_short(call, monkeypatch)
        assert short == (seed > 0)
        assert torch.equal(result if short else call(), eager.sample(x, *where, **asked))
    wrong = {
        "history_ids leave the vocabulary of 97": {"history_ids": asked["history_ids"] + 97},
        "bias_offsets do not cut bias_ids into 3 rows": {"bias_offsets": asked["bias_offsets"] + 1},
        "history_offsets, history_ids and history_counts do not fit": {"history_counts": asked["history_counts"][1:]},
        "history needs repetition": {"presence": None},
    }
    for message, change in wrong.items():
        with pytest.raises(InvalidInputError, match=message):
            direct.sample(x, *where, **asked | change)


@pytest.mark.parametrize("length", [0, 1])
def test_a_list_whose_stride_only_its_length_makes_contiguous(length):
    x, where = logits("normal", 1, 97, torch.float32, 1), numbers(1, 1)
    every = torch.arange(97, dtype=torch.int32)[::2], torch.linspace(-9, 9, 97)[::2]
    for tokens in (length, length, 40, 40):
        ids, values = (one[:tokens] for one in every)
        asked = {"bias_offsets": torch.tensor([0, tokens]), "bias_ids": ids, "bias_values": values}
        assert torch.equal(direct.sample(x, *where, **asked), eager.sample(x, *where, **asked))


@pytest.mark.parametrize("names", [("bias_ids",), ("bias_values",), ("history_counts", "history_ids")])
def test_lists_that_nothing_cuts_are_not_read(names):
    x, where = logits("normal", 2, 97, torch.float32, 1), numbers(2, 1)
    asked = {name: torch.zeros(3, dtype=torch.float32 if name == "bias_values" else torch.int32) for name in names}
    for _ in range(2):
        assert torch.equal(direct.sample(x, *where, **asked), eager.sample(x, *where, **asked))


def test_ids_that_do_not_ascend_are_refused():
    x, where, asked = logits("normal", 2, 97, torch.float32, 1), numbers(2, 1), history(2, 97, 1)
    asked |= {"history_offsets": torch.tensor([0, 2, 4]), "history_counts": torch.ones(4, dtype=torch.int32)}
    for ids in ([3, 9, 1, 4], [3, 9, 1, 4]):
        asked["history_ids"] = torch.tensor(ids, dtype=torch.int32)
        assert torch.equal(direct.sample(x, *where, **asked), eager.sample(x, *where, **asked))
    asked["history_ids"] = torch.tensor([3, 9, 4, 1], dtype=torch.int32)
    for way in (*WAYS.values(), registry.get("sample").eager):
        with pytest.raises(InvalidInputError, match="history_ids do not ascend within a row"):
            way(x, *where, **asked)


@pytest.mark.parametrize("way", WAYS)
def test_a_library_that_can_no_longer_be_built_is_a_fallback_that_is_counted(way, monkeypatch):
    x, asked, where = logits("normal", 2, 97, torch.float32, 1), settings("top-p", 2, 97), numbers(2, 1)
    WAYS[way](x, *where, **asked)

    def load(name):
        raise KernelBuildError("no compiler any more")

    monkeypatch.setattr(build, "load", load)
    monkeypatch.setattr(registry, "fallbacks", registry.fallbacks.copy())
    assert torch.equal(WAYS[way](x, *where, **asked), eager.sample(x, *where, **asked))
    assert registry.fallbacks["sample", "host_cpp: no compiler any more"] == 1


def test_logits_that_no_kernel_takes_are_a_fallback_that_is_counted(monkeypatch):
    monkeypatch.setattr(registry, "fallbacks", registry.fallbacks.copy())
    registry.fallbacks.clear()
    x, asked, where = logits("normal", 2, 97, torch.float64, 1), settings("top-p", 2, 97), numbers(2, 1)
    for _ in range(2):
        assert torch.equal(direct.sample(x, *where, **asked), eager.sample(x, *where, **asked))
    ((name, reason), count), = registry.fallbacks.items()
    assert name == "sample" and "torch.float64" in reason and count == 2


@pytest.mark.parametrize("isa", ["portable", "auto"])
def test_the_instruction_set_that_is_asked_for(isa, monkeypatch):
    x, asked, where = logits("normal", 2, 97, torch.float32, 1), settings("top-p", 2, 97), numbers(2, 1)
    direct.sample(x, *where, **asked)
    loaded, load = [], build.load
    if isa != "auto":
        assert available(isa, monkeypatch)
    monkeypatch.setattr(build, "load", lambda name: loaded.append(load(name)) or loaded[-1])
    direct.sample(x, *where, **asked)
    assert f"-{build.host_isa()}-" in loaded[-1]._name


def test_fake_tensors_transforms_and_modes_go_through_the_dispatcher():
    x, asked, where = logits("normal", 2, 97, torch.float32, 1), settings("top-p", 2, 97), numbers(2, 1)
    expected = direct.sample(x, *where, **asked)
    with FakeTensorMode() as mode:
        fake = direct.sample(*(mode.from_tensor(t) for t in (x, *where)), temperature=torch.ones(2))
        assert isinstance(fake, torch._subclasses.FakeTensor) and fake.shape == (2,)
    for around in (FlopCounterMode(display=False), torch.autograd.graph.saved_tensors_hooks(abs, abs)):
        with around:
            assert torch.equal(direct.sample(x, *where, **asked), expected)
    for kind, method in ((TorchFunctionMode, "__torch_function__"), (TorchDispatchMode, "__torch_dispatch__")):
        seen = []

        def see(self, function, types, args=(), kwargs=None, seen=seen):
            seen.append(function)
            return function(*args, **kwargs or {})

        with type("Mode", (kind,), {method: see})():
            result = direct.sample(x, *where, **asked)
        assert seen == [torch.ops.gcu.sample.default] and torch.equal(result, expected)
    functional = torch.func.functionalize(lambda y: direct.sample(y, *where, **asked))
    assert torch.equal(functional(x), expected)


def test_tensors_of_inference_mode(monkeypatch):
    for _ in range(2):
        for inside in (False, True):
            with torch.inference_mode(inside):
                x, asked = logits("normal", 2, 97, torch.float32, 1), settings("top-p", 2, 97)
                where = numbers(2, 1)
                direct.sample(x, *where, **asked)
                actual, short = is_short(lambda: direct.sample(x, *where, **asked), monkeypatch)  # noqa: B023
                assert short and actual.is_inference() == inside
                assert torch.equal(actual, eager.sample(x, *where, **asked))


def test_it_is_counted_and_the_shadow_check_sees_it(monkeypatch):
    x, asked, where = logits("normal", 2, 97, torch.float32, 1), settings("top-p", 2, 97), numbers(2, 1)
    before, seen = registry.calls["sample", "host_cpp"], []
    for _ in range(3):
        direct.sample(x, *where, **asked)
    assert registry.calls["sample", "host_cpp"] == before + 3

    def watcher(op, implementation, run, site, args, kwargs):
        seen.append((op.name, implementation, site))
        return run(*args, **kwargs)

    monkeypatch.setattr(registry, "watcher", watcher)
    direct.sample(x, *where, **asked, site="there")
    assert seen == [("sample", "host_cpp", "there")]


def test_threads():
    """Forms of their own and one of all."""
    shared, wrong = settings("all", 2, 97, 9), []

    def work(seed):
        own = settings("all", seed + 1, 97, seed)
        calls = [(logits("normal", 2, 97, torch.bfloat16, seed), numbers(2, seed), shared)]
        calls.append((logits("normal", seed + 1, 97, torch.float32, seed), numbers(seed + 1, seed), own))
        expected = [eager.sample(x, *where, **asked) for x, where, asked in calls]
        for _ in range(50):
            for (x, where, asked), tokens in zip(calls, expected, strict=True):
                if not torch.equal(direct.sample(x, *where, **asked), tokens):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_generated_code_goes_the_short_way_but_for_the_shadow_check():
    x, (seeds, positions) = logits("normal", 2, 97, torch.float32, 2), numbers(2, 1)
    temperature, share = torch.ones(2), torch.full((2,), 0.8)

    def chain(y):
        return torch.ops.gcu.sample(y * 2, seeds, positions, temperature, None, share)

    expected = eager.sample(x * 2, seeds, positions, temperature, None, share)
    run = torch.compile(chain, backend="gcu", options={"cache": False})
    with torch.no_grad():
        actual, (code, *_) = run_and_get_code(run, x)
        assert torch.equal(actual, expected)
        if HAS_PLACE:
            (line,) = (line for line in code.splitlines() if "gcu_direct.sample(" in line)
            assert "top_p=" in line and "None" not in line
        assert torch.equal(run(x), expected)
        torch._dynamo.reset()
        try:
            run = torch.compile(chain, backend="gcu", options={"cache": False, "shadow": "eager"})
            assert torch.equal(run(x), expected)
            (found,) = [one for one in shadow.statistics() if one.op == "sample"]
            assert (found.calls, found.breaches) == (1, 0) and found.node
        finally:
            shadow.disable()
            shadow.reset()
            torch._dynamo.reset()
