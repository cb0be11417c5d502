"""Calls `sample.cpp`."""

from __future__ import annotations

import struct

import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels.host import build

POINTERS = (
    ("temperature", torch.float32),
    ("top_k", torch.int32),
    ("top_p", torch.float32),
    ("min_p", torch.float32),
    ("forbidden", torch.bool),
    ("bias_offsets", torch.int64),
    ("bias_ids", torch.int32),
    ("bias_values", torch.float32),
    ("history_offsets", torch.int64),
    ("history_ids", torch.int32),
    ("history_counts", torch.int32),
    ("repetition", torch.float32),
    ("frequency", torch.float32),
    ("presence", torch.float32),
    ("seeds", torch.int64),
    ("positions", torch.int64),
)
DRAFTS = (("draft_ids", torch.int64), ("draft_probabilities", torch.float32))
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# What gcu_sample returns when it refuses a list, as `enum Fault` of sample.cpp says it.
FAULTS = {
    1: "bias_offsets do not cut bias_ids into {rows} rows",
    2: "bias_ids leave the vocabulary of {vocab}",
    3: "bias_ids do not ascend within a row",
    4: "history_offsets do not cut history_ids into {rows} rows",
    5: "history_ids leave the vocabulary of {vocab}",
    6: "history_ids do not ascend within a row, each once",
    7: "token_ids leave the vocabulary of {vocab}",
}


# `struct Arguments` of sampling/arguments.h and `struct Scored` of sampling/scores.h, field by field, 8 bytes each:
# packed they cost a tenth of a ctypes structure.
FIELDS = (
    *("logits", "rows", "vocab", "stride", "dtype", "threads"),
    *(name for name, _ in POINTERS),
    *("ids", "kept", "bias_count", "history_count"),
    *(name for name, _ in DRAFTS),
)
# Argument -> its place among the fields, and the dtype that the kernel takes.
WANTED = {name: (FIELDS.index(name), dtype) for name, dtype in (*POINTERS, *DRAFTS)}
_IDS, _KEPT = FIELDS.index("ids"), FIELDS.index("kept")
_COUNTS = {"bias_ids": FIELDS.index("bias_count"), "history_ids": FIELDS.index("history_count")}
SCORED = ("tokens", "given", "count", "normalised", "ids", "scores", "ranks")
PACK, _PACK_SCORED = struct.Struct(f"{len(FIELDS)}q").pack, struct.Struct(f"{len(SCORED)}q").pack


def refuses(logits: torch.Tensor, **settings) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if logits.dtype not in DTYPES:
        return f"logits are {logits.dtype}, not one of {', '.join(map(str, DTYPES))}"
    if logits.stride(-1) != 1:
        return "a row of logits is not contiguous"
    return build.refusal("sample")


def run(logits: torch.Tensor, kept: torch.Tensor | None = None, **settings) -> torch.Tensor:
    """`gcu::sample`; see `sampling/eager.py`. With draft_ids and draft_probabilities, `rejection_eager.tokens`.

    Args:
        kept: [rows, vocab] bool, written with the kept set; for tests.

    Raises:
        InvalidInputError: offsets or ids of a list that leave it or the vocabulary.
    """
    ids = torch.empty(logits.shape[0], dtype=torch.int64)
    fields, _held = arguments(logits, settings)
    fields[_IDS] = ids.data_ptr()
    if kept is not None:
        fields[_KEPT] = kept.data_ptr()
    if fault := build.load("sample").gcu_sample(PACK(*fields)):
        raise _error("sample", logits, fault)
    return ids


def run_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, count: int, normalised: bool, **settings):
    """`gcu::logprobs`; see `sampling/logprobs_eager.py`.

    Raises:
        InvalidInputError: offsets or ids of a list, or tokens, that leave it or the vocabulary.
    """
    rows, given = token_ids.shape
    count = min(count, logits.shape[1])
    ids = torch.empty(rows, given + count, dtype=torch.int32)
    scores = torch.empty(rows, given + count)
    ranks = torch.empty(rows, dtype=torch.int64)
    fields, _held = arguments(logits, settings)
    tokens = token_ids.long().contiguous()
    pointers = (t.data_ptr() for t in (ids, scores, ranks))
    scored = _PACK_SCORED(tokens.data_ptr(), given, count, normalised, *pointers)
    if fault := build.load("sample").gcu_logprobs(PACK(*fields), scored):
        raise _error("logprobs", logits, fault)
    return ids, scores, ranks


def arguments(logits: torch.Tensor, settings: dict) -> tuple[list[int], list[torch.Tensor]]:
    """All fields, and the converted tensors, which must live until the call is over. It runs in every step."""
    found = [0] * len(FIELDS)
    found[:6] = (  # those that FIELDS begins with
        *(logits.data_ptr(), *logits.shape, logits.stride(0)),
        *(DTYPES[logits.dtype], torch.get_num_threads()),
    )
    held = []
    for name, value in settings.items():
        if value is None:
            continue
        place, dtype = WANTED[name]
        if value.dtype is not dtype or not value.is_contiguous():
            value = value.to(dtype).contiguous()
            held.append(value)
        found[place] = value.data_ptr()
        if name in _COUNTS:
            found[_COUNTS[name]] = value.numel()
    return found, held


def _error(operation: str, logits: torch.Tensor, fault: int) -> InvalidInputError:
    rows, vocab = logits.shape
    return InvalidInputError(f"gcu::{operation}: " + FAULTS[fault].format(rows=rows, vocab=vocab))
