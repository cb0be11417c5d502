"""Calls `sample.cpp`."""

from __future__ import annotations

import ctypes

import torch

from gcu_compile.errors import KernelBuildError
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
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
    """`gcu::sample`; see `sampling/eager.py`.

    Args:
        kept: [rows, vocab] bool, written with the kept set; for tests.
    """
    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    # Converted tensors must live until the call is over.
    held = {name: settings[name].to(dtype).contiguous() for name, dtype in POINTERS if settings.get(name) is not None}
    arguments = Arguments(
        logits=logits.data_ptr(),
        rows=rows,
        vocab=vocab,
        stride=logits.stride(0),
        dtype=DTYPES[logits.dtype],
        threads=torch.get_num_threads(),
        ids=ids.data_ptr(),
        kept=None if kept is None else kept.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in held.items()},
    )
    build.load("sample").gcu_sample(ctypes.byref(arguments))
    return ids
