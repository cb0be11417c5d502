"""The passes of `sample_kernel` shared by several programs per row, for batches that would leave a card idle.

    largest (rows x splits) -> begin (rows) -> [measure (rows x splits) -> advance (rows)] a few times -> sample_kernel

Each launch leaves its sums in memory for the next; `sample_kernel` goes on from where they got. How many passes are
shared changes the time, never the token: sums of weights are exact (`masses.py`).
"""

import triton
import triton.language as tl

from gcu_compile.kernels.triton import double_single as ds
from gcu_compile.kernels.triton import logits, masses, sample_kernel, states, thresholds

FIELDS = tl.constexpr(8)  # of a pass: count, least, most, and a mass of five words


@triton.jit
def _chunk(split, vocab, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """First id and end of a split's whole tiles."""
    tiles = (vocab + BLOCK - 1) // BLOCK
    share = (tiles + SPLITS - 1) // SPLITS * BLOCK
    return split * share, tl.minimum(split * share + share, vocab)


@triton.jit
def largest_kernel(
    partial_ptr,
    logits_ptr,
    forbidden_ptr,
    bias_offsets_ptr,
    bias_ids,
    bias_values,
    history_offsets_ptr,
    history_ids,
    history_counts,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    stride,
    vocab,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Programs: rows x splits. partial: [rows, 3, SPLITS] int32: largest key, its first id, smallest key above -inf."""
    index, split = tl.program_id(0), tl.program_id(1)
    at, numbers = logits.numbers_of(
        index, bias_offsets_ptr, bias_ids, history_offsets_ptr, history_ids, repetition_ptr, frequency_ptr, presence_ptr
    )
    row = (
        logits_ptr + index * stride, forbidden_ptr, index * vocab, bias_ids, bias_values, history_ids, history_counts,
        numbers,
    )  # fmt: skip
    start, end = _chunk(split, vocab, BLOCK, SPLITS)
    at = logits.seek(row, at, start)
    top, top_id, bottom = sample_kernel.largest(row, at, start, end, vocab, BLOCK)
    out = partial_ptr + index * (3 * SPLITS) + split
    tl.store(out, top)
    tl.store(out + SPLITS, top_id)
    tl.store(out + 2 * SPLITS, bottom)


@triton.jit
def begin_kernel(
    state_ptr, partial_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, vocab, PIVOTS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One program per row: joins the splits' largest keys and stores the search's first state."""
    index = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    base = partial_ptr + index * (3 * SPLITS)
    tops = tl.load(base + split)
    top = tl.max(tops, axis=0)
    # Splits ascend by id: of equal keys the first is the smallest id.
    top_id = tl.min(tl.where(tops == top, tl.load(base + SPLITS + split), thresholds.INT_MAX), axis=0)
    bottom = tl.min(tl.load(base + 2 * SPLITS + split), axis=0)
    temperature, k, p = sample_kernel.wanted(index, temperature_ptr, top_k_ptr, top_p_ptr)
    threshold = bottom
    if (top >= thresholds.LOWEST) & (temperature >= sample_kernel.GREEDY):
        inv0, inv1, inv2 = ds.inverse(temperature)
        scale = (logits.unordered(top), inv0, inv1, inv2)
        threshold = sample_kernel.floor_of(index, min_p_ptr, bottom, top, scale, PIVOTS)
    state = thresholds.begin(threshold, top, k, vocab)
    states.store(state_ptr + index * states.STATE, state, top, top_id, bottom)


@triton.jit
def measure_kernel(
    partial_ptr,
    state_ptr,
    logits_ptr,
    temperature_ptr,
    forbidden_ptr,
    bias_offsets_ptr,
    bias_ids,
    bias_values,
    history_offsets_ptr,
    history_ids,
    history_counts,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    stride,
    vocab,
    BLOCK: tl.constexpr,
    PIVOTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Programs: rows x splits, one pass. partial: [rows, FIELDS, SPLITS, PIVOTS] int32, what `measure` returns."""
    index, split = tl.program_id(0), tl.program_id(1)
    top, top_id, bottom = states.largest(state_ptr + index * states.STATE)
    state = states.load(state_ptr + index * states.STATE)
    temperature, k, p = sample_kernel.wanted(index, temperature_ptr, None, None)
    if (state[0] < 2) & (temperature >= sample_kernel.GREEDY) & (top >= thresholds.LOWEST):
        at, numbers = logits.numbers_of(
            index,
            bias_offsets_ptr,
            bias_ids,
            history_offsets_ptr,
            history_ids,
            repetition_ptr,
            frequency_ptr,
            presence_ptr,
        )
        row = (
            logits_ptr + index * stride, forbidden_ptr, index * vocab, bias_ids, bias_values, history_ids,
            history_counts, numbers,
        )  # fmt: skip
        start, end = _chunk(split, vocab, BLOCK, SPLITS)
        at = logits.seek(row, at, start)
        inv0, inv1, inv2 = ds.inverse(temperature)
        scale = (logits.unordered(top), inv0, inv1, inv2)
        pivots = thresholds.pivots_of(state, PIVOTS)
        count, least, most, mass = thresholds.measure(row, at, start, end, state, pivots, scale, vocab, BLOCK, PIVOTS)
        out = partial_ptr + index * (FIELDS * SPLITS * PIVOTS) + split * PIVOTS + tl.arange(0, PIVOTS)
        tl.store(out, count)
        tl.store(out + SPLITS * PIVOTS, least)
        tl.store(out + 2 * SPLITS * PIVOTS, most)
        tl.store(out + 3 * SPLITS * PIVOTS, mass[0])
        tl.store(out + 4 * SPLITS * PIVOTS, mass[1])
        tl.store(out + 5 * SPLITS * PIVOTS, mass[2])
        tl.store(out + 6 * SPLITS * PIVOTS, mass[3])
        tl.store(out + 7 * SPLITS * PIVOTS, mass[4])


@triton.jit
def _field(base, field, PIVOTS: tl.constexpr, SPLITS: tl.constexpr):
    """[SPLITS, PIVOTS] of one field of a row's partial sums."""
    at = tl.arange(0, SPLITS)[:, None] * PIVOTS + tl.arange(0, PIVOTS)[None, :]
    return tl.load(base + field * (SPLITS * PIVOTS) + at)


@triton.jit
def advance_kernel(
    state_ptr, partial_ptr, temperature_ptr, top_k_ptr, top_p_ptr, PIVOTS: tl.constexpr, SPLITS: tl.constexpr
):
    """One program per row: joins what the splits measured and stores the next state."""
    index = tl.program_id(0)
    top, top_id, bottom = states.largest(state_ptr + index * states.STATE)
    state = states.load(state_ptr + index * states.STATE)
    temperature, k, p = sample_kernel.wanted(index, temperature_ptr, top_k_ptr, top_p_ptr)
    if (state[0] < 2) & (temperature >= sample_kernel.GREEDY) & (top >= thresholds.LOWEST):
        base = partial_ptr + index * (FIELDS * SPLITS * PIVOTS)
        m = tl.sum(_field(base, 3, PIVOTS, SPLITS), axis=0)
        a0 = tl.sum(_field(base, 4, PIVOTS, SPLITS), axis=0)
        a1 = tl.sum(_field(base, 5, PIVOTS, SPLITS), axis=0)
        a2 = tl.sum(_field(base, 6, PIVOTS, SPLITS), axis=0)
        a3 = tl.sum(_field(base, 7, PIVOTS, SPLITS), axis=0)
        count = tl.sum(_field(base, 0, PIVOTS, SPLITS), axis=0)
        least = tl.min(_field(base, 1, PIVOTS, SPLITS), axis=0)
        most = tl.max(_field(base, 2, PIVOTS, SPLITS), axis=0)
        inv0, inv1, inv2 = ds.inverse(temperature)
        scale = (logits.unordered(top), inv0, inv1, inv2)
        measured = (count, least, most, masses.carry(m, a0, a1, a2, a3))
        state = thresholds.advance(state, measured, top, k, p, scale, PIVOTS)
        states.store(state_ptr + index * states.STATE, state, top, top_id, bottom)


EXACT = True  # a * b + c must round twice
CONFIG = "sample"  # in configs.yaml


def for_cuda(constexprs):
    """The specimen's constexprs with the tile of a launch on an NVIDIA GPU."""
    return constexprs | ({"BLOCK": 1024} if "BLOCK" in constexprs else {})


def _specimens():
    """One row of 151936 bfloat16 logits over 16 programs, with every setting."""
    kinds = {"partial_ptr": "*i32", "state_ptr": "*i32", "logits_ptr": "*bf16", "temperature_ptr": "*fp32"}
    kinds |= {"top_k_ptr": "*i32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32", "forbidden_ptr": "*i8"}
    kinds |= dict.fromkeys(("bias_offsets_ptr", "bias_ids", "history_offsets_ptr"), "*i32")
    kinds |= dict.fromkeys(("history_ids", "history_counts"), "*i32") | {"bias_values": "*fp32"}
    kinds |= dict.fromkeys(("repetition_ptr", "frequency_ptr", "presence_ptr"), "*fp32")
    kinds |= {"stride": "i32", "vocab": "i32"}
    sizes = {"BLOCK": 4096, "PIVOTS": 16, "SPLITS": 16}
    values = {"stride": 151936, "vocab": 151936}
    for kernel, grid in (
        (largest_kernel, (1, 16)),
        (begin_kernel, (1,)),
        (measure_kernel, (1, 16)),
        (advance_kernel, (1,)),
    ):
        names = kernel.arg_names
        yield {"kernel": kernel, "signature": {n: kind for n, kind in kinds.items() if n in names},
               "constexprs": {n: size for n, size in sizes.items() if n in names}, "grid": grid, "num_warps": 4,
               "num_stages": 3, "values": {n: v for n, v in values.items() if n in names},
               "name": f"sample {kernel.__name__}"}  # fmt: skip


LEGALITY_SPECIMENS = list(_specimens())
