"""The shadow check of operations on a paged cache copies the blocks that a call touches, and no others."""

import pytest
import torch

import gcu_compile.backend  # noqa: F401  (defines the operations)
from gcu_compile.debug import shadow
from gcu_compile.kernels import registry

BLOCKS, KV_HEADS, SLOTS, SIZE, TOKENS = 512, 2, 16, 32, 6


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    shadow.reset()
    yield
    registry.watcher = None


def caches(int8=False):
    shape = (BLOCKS, KV_HEADS, SLOTS, SIZE)
    if int8:
        return {name: torch.randint(-127, 128, shape, dtype=torch.int8) for name in ("k_cache", "v_cache")}
    return {"k_cache": torch.randn(shape), "v_cache": torch.randn(shape)}


def attention(int8=False):
    """Three sequences; entries of the table past their ends name no block."""
    lengths = torch.tensor([3, 40, 17], dtype=torch.int32)
    table = torch.randperm(BLOCKS, dtype=torch.int32)[:12].view(3, 4)
    table[torch.arange(4) * SLOTS >= lengths[:, None]] = -1
    scales = {}
    if int8:
        scales = {name: torch.rand(BLOCKS, KV_HEADS, SLOTS) / 64 for name in ("k_scale", "v_scale")}
    starts = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    given = {"block_table": table, "query_start_loc": starts, "seq_lens": lengths, "scale": 0.2}
    return {"q": torch.randn(TOKENS, 4, SIZE), **caches(int8), **given, **scales}


def latent():
    given = attention()
    del given["k_cache"], given["v_cache"]
    weights = {"w_uk": torch.randn(4, 24, 16), "w_uv": torch.randn(4, 16, 20)}
    return {**given, "latent_cache": torch.randn(BLOCKS, SLOTS, 24), **weights}


def write(int8=False):
    slots = torch.randperm(BLOCKS * SLOTS)[:TOKENS]
    slots[2] = -1
    scales = {}
    if int8:
        scales = {name: torch.rand(BLOCKS, KV_HEADS, SLOTS) for name in ("k_scale_cache", "v_scale_cache")}
    k, v = torch.randn(2, TOKENS, KV_HEADS, SIZE)
    return {"k": k, "v": v, "slot_mapping": slots, **caches(int8), **scales}


def rope(int8=False):
    given = write(int8)
    del given["k"], given["v"]
    qkv, angles = torch.randn(TOKENS, 8 * SIZE), torch.rand(TOKENS, SIZE)
    return {"qkv": qkv, "cos_sin": angles, "positions": torch.arange(TOKENS), **given}


def called(op, given):
    """As the dispatcher passes arguments: positional ones in the order of the schema, as far as they are given."""
    args, rest = [], dict(given)
    for argument in getattr(torch.ops.gcu, op.name).default._schema.arguments:
        if argument.kwarg_only or argument.name not in rest:
            break
        args.append(rest.pop(argument.name))
    return tuple(args), rest


def by_name(op, args, kwargs):
    names = [argument.name for argument in getattr(torch.ops.gcu, op.name).default._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


CASES = {
    "paged_attention": (attention, {}),
    "paged_attention, int8": (attention, {"int8": True}),
    "paged_attention_int8": (attention, {}),
    "mla_attention": (latent, {}),
    "write_kv": (write, {}),
    "write_kv, int8": (write, {"int8": True}),
    "rope_and_cache": (rope, {}),
    "rope_and_cache, int8": (rope, {"int8": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_part_means_what_the_whole_means(case):
    make, settings = CASES[case]
    op, given = registry.get(case.split(",")[0]), make(**settings)
    (args, kwargs), blocks = shadow.narrowed(op, *called(op, given))
    part = by_name(op, args, kwargs)
    paged = [x for name, x in part.items() if given[name] is not x and x.shape[0] != given[name].shape[0]]
    assert len(paged) >= 1 and all(x.shape[0] <= 8 < BLOCKS for x in paged)
    written = sorted(shadow.written_arguments(op) & given.keys())
    args_whole, kwargs_whole = called(op, given)
    small, whole = op.eager(*args, **kwargs), op.eager(*args_whole, **kwargs_whole)
    results = [*shadow._tensors(small), *(part[name] for name in written)]
    expected = [*shadow._tensors(whole), *(blocks(given[name]) for name in written)]
    assert len(results) == len(expected) > 0
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("float64", [False, True])
def test_right_kernels_pass_and_write_the_whole_cache(case, float64):
    make, settings = CASES[case]
    op, given = registry.get(case.split(",")[0]), make(**settings)
    meant = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    args, kwargs = called(op, meant)
    op.eager(*args, **kwargs)
    registry.watcher = shadow.Shadow(float64)
    args, kwargs = called(op, given)
    registry.dispatch(op, *args, **kwargs)
    (found,) = shadow.statistics()
    assert (found.calls, found.breaches) == (1, 0) and found.ratio <= 1, found
    # An int8 cache's own scales are float32 and nothing else: that call is compared in its own dtypes, and says so.
    only_float32 = float64 and "k_scale_cache" in given
    assert len(found.unchecked) == only_float32 and all("float64" in reason for reason in found.unchecked)
    for name in shadow.written_arguments(op) & given.keys():
        torch.testing.assert_close(given[name], meant[name])


def test_a_wrong_write_is_a_breach():
    op, given = registry.get("write_kv"), write()

    def wrong(*args, **kwargs):
        op.eager(*args, **kwargs)
        given["v_cache"][given["slot_mapping"][0] // SLOTS] += 1

    shadow.Shadow(True)(op, "wrong", wrong, "", (), given)
    (found,) = shadow.statistics()
    assert found.breaches == 1 and found.largest == pytest.approx(1.0, rel=1e-3)


def test_a_slot_that_does_not_exist_is_still_the_operation_s_own_error():
    op, given = registry.get("write_kv"), write()
    given["slot_mapping"][0] = BLOCKS * SLOTS
    registry.watcher = shadow.Shadow(False)
    with pytest.raises(ValueError, match="slot_mapping"):
        registry.dispatch(op, **given)


def test_a_quantised_value_may_be_one_step_away_and_not_two():
    meant = torch.tensor([-128, 0, 127], dtype=torch.int8)
    near, far = torch.tensor([-127, 0, 127], dtype=torch.int8), torch.tensor([-128, 2, 127], dtype=torch.int8)
    assert shadow.compare([near], [meant], 32, 2, steps=1)[1] <= 1 < shadow.compare([far], [meant], 32, 2, steps=1)[1]
    assert shadow.compare([near], [meant], 32, 2)[1] == float("inf")
