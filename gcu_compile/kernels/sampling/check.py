"""Which arguments the logits chain takes; what is wrong is said by name."""

from __future__ import annotations

import torch

from gcu_compile.errors import InvalidInputError

SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "forbidden",
    "bias_offsets",
    "bias_ids",
    "bias_values",
    "history_offsets",
    "history_ids",
    "history_counts",
    "repetition",
    "frequency",
    "presence",
)

PER_ROW = ("temperature", "top_k", "top_p", "min_p")
PENALTIES = ("repetition", "frequency", "presence")
ROWS = frozenset((*PER_ROW, *PENALTIES, "seeds", "positions"))


def check(operation: str, logits: torch.Tensor, asked: dict[str, torch.Tensor | None]) -> None:
    """Raise `InvalidInputError` for shapes that no kernel can take. It runs in every step and touches no values."""
    shape = logits.shape
    if len(shape) != 2 or shape[1] == 0:
        raise InvalidInputError(f"gcu::{operation}: logits are {tuple(shape)}, expected [rows, vocab]")
    for name, value in asked.items():
        if value is not None and name in ROWS and value.shape != shape[:1]:
            raise InvalidInputError(f"gcu::{operation}: {name} is {tuple(value.shape)}, expected [{shape[0]}]")
    forbidden = asked.get("forbidden")
    if forbidden is not None and forbidden.shape != shape:
        raise InvalidInputError(f"gcu::{operation}: forbidden is {tuple(forbidden.shape)}, expected {tuple(shape)}")
    for kind, values in (("bias", "bias_values"), ("history", "history_counts")):
        offsets = asked.get(f"{kind}_offsets")
        if offsets is None:
            continue
        if kind == "history" and any(asked.get(name) is None for name in PENALTIES):
            raise InvalidInputError(f"gcu::{operation}: a history needs repetition, frequency and presence")
        ids, other = asked.get(f"{kind}_ids"), asked.get(values)
        if offsets.shape != (shape[0] + 1,) or ids is None or other is None or ids.shape != other.shape:
            names = f"{kind}_offsets, {kind}_ids and {values}"
            raise InvalidInputError(f"gcu::{operation}: {names} do not fit together")


def check_lists(rows: int, vocab: int, settings: dict[str, torch.Tensor | None]) -> None:
    """Raise `InvalidInputError` for lists that leave their rows or the vocabulary; kernels check this themselves."""
    for kind, step, order in (("bias", 0, "within a row"), ("history", 1, "within a row, each once")):
        offsets, ids = settings.get(f"{kind}_offsets"), settings.get(f"{kind}_ids")
        if offsets is None:
            continue
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
            raise InvalidInputError(f"gcu::sample: {kind}_offsets do not cut {kind}_ids into {rows} rows")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise InvalidInputError(f"gcu::sample: {kind}_ids leave the vocabulary of {vocab}")
        row = torch.repeat_interleave(offsets.diff())
        if bool(((ids.diff() < step) & (row.diff() == 0)).any()):
            raise InvalidInputError(f"gcu::sample: {kind}_ids do not ascend {order}")
