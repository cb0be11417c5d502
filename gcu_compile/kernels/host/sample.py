"""Calls `sample.cpp`."""

from __future__ import annotations

import ctypes

import torch

from gcu_compile.errors import InvalidInputError, KernelBuildError
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
    3: "history_offsets do not cut history_ids into {rows} rows",
    4: "history_ids leave the vocabulary of {vocab}",
}


class Arguments(ctypes.Structure):
    """`struct Arguments` of sample.cpp, field by field."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name, _ in POINTERS),
        ("ids", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("bias_count", ctypes.c_int64),
        ("history_count", ctypes.c_int64),
        ("draft_ids", ctypes.c_void_p),
        ("draft_probabilities", ctypes.c_void_p),
    )


def refuses(logits: torch.Tensor, **settings) -> str | None:
    """Why the C++ kernel cannot take these arguments, or None."""
    if logits.dtype not in DTYPES:
        return f"logits are {logits.dtype}, not one of {', '.join(map(str, DTYPES))}"
    if logits.stride(-1) != 1:
        return "a row of logits is not contiguous"
    try:
        build.load("sample")
    except KernelBuildError as error:
        return str(error)
    return None


def run(logits: torch.Tensor, kept: torch.Tensor | None = None, **settings) -> torch.Tensor:
    """`gcu::sample`; see `sampling/eager.py`. With draft_ids and draft_probabilities, `rejection_eager.tokens`.

    Args:
        kept: [rows, vocab] bool, written with the kept set; for tests.

    Raises:
        InvalidInputError: offsets or ids of a list that leave it or the vocabulary.
    """
    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    arguments = Arguments(
        logits.data_ptr(), rows, vocab, logits.stride(0), DTYPES[logits.dtype], torch.get_num_threads()
    )
    arguments.ids = ids.data_ptr()
    if kept is not None:
        arguments.kept = kept.data_ptr()
    held = []  # converted tensors must live until the call is over
    for name, dtype in (*POINTERS, *DRAFTS):
        value = settings.get(name)
        if value is None:
            continue
        if value.dtype != dtype or not value.is_contiguous():
            value = value.to(dtype).contiguous()
            held.append(value)
        setattr(arguments, name, value.data_ptr())
    for kind in ("bias", "history"):
        if settings.get(f"{kind}_ids") is not None:
            setattr(arguments, f"{kind}_count", settings[f"{kind}_ids"].numel())
    fault = build.load("sample").gcu_sample(ctypes.byref(arguments))
    if fault:
        raise InvalidInputError("gcu::sample: " + FAULTS[fault].format(rows=rows, vocab=vocab))
    return ids
