"""`torch.ops.gcu.sample`: the logits chain as one operation, without a sort and in the logits' own precision."""

from __future__ import annotations

import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.host import sample as host
from gcu_compile.kernels.sampling import eager
from gcu_compile.kernels.triton import sample as triton

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


def check(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, **settings) -> None:
    """Raise `InvalidInputError` for shapes that no kernel can take. It runs in every step and touches no values."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise InvalidInputError(f"gcu::sample: logits are {tuple(logits.shape)}, expected [rows, vocab]")
    rows = logits.shape[0]
    per_row = {name: settings.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
    per_row |= {"seeds": seeds, "positions": positions}
    if settings.get("history_offsets") is not None:
        per_row |= {name: settings.get(name) for name in ("repetition", "frequency", "presence")}
        if any(per_row[name] is None for name in ("repetition", "frequency", "presence")):
            raise InvalidInputError("gcu::sample: a history needs repetition, frequency and presence")
    for name, value in per_row.items():
        if value is not None and value.shape != (rows,):
            raise InvalidInputError(f"gcu::sample: {name} is {tuple(value.shape)}, expected [{rows}]")
    forbidden = settings.get("forbidden")
    if forbidden is not None and forbidden.shape != logits.shape:
        raise InvalidInputError(f"gcu::sample: forbidden is {tuple(forbidden.shape)}, expected {tuple(logits.shape)}")
    for kind, values in (("bias", "bias_values"), ("history", "history_counts")):
        offsets, ids, other = (settings.get(n) for n in (f"{kind}_offsets", f"{kind}_ids", values))
        if offsets is None:
            continue
        if offsets.shape != (rows + 1,) or ids is None or other is None or ids.shape != other.shape:
            raise InvalidInputError(f"gcu::sample: {kind}_offsets, {kind}_ids and {values} do not fit together")


def check_lists(rows: int, vocab: int, settings: dict[str, torch.Tensor | None]) -> None:
    """Raise `InvalidInputError` for lists that leave their rows or the vocabulary; kernels check this themselves."""
    for kind in ("bias", "history"):
        offsets, ids = settings.get(f"{kind}_offsets"), settings.get(f"{kind}_ids")
        if offsets is None:
            continue
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
            raise InvalidInputError(f"gcu::sample: {kind}_offsets do not cut {kind}_ids into {rows} rows")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise InvalidInputError(f"gcu::sample: {kind}_ids leave the vocabulary of {vocab}")


def _named(function):
    """The operation passes settings by position; implementations take them by name."""

    def call(logits, seeds, positions, *values, **settings):
        return function(
            logits, seeds=seeds, positions=positions, **dict(zip(SETTINGS, values, strict=False)), **settings
        )

    return call


def _run(logits, **settings):
    check(logits, **settings)
    return host.run(logits, **settings)


def _run_triton(logits, **settings):
    check(logits, **settings)
    return triton.run(logits, **settings)


def _eager(logits, **settings):
    if not isinstance(logits, torch._subclasses.FakeTensor):  # a fake tensor has no values to check
        check(logits, **settings)
        check_lists(*logits.shape, settings)
    return eager.sample(logits, **settings)


SAMPLE = registry.register(
    registry.FusedOp(
        "sample",
        "(Tensor logits, Tensor seeds, Tensor positions, "
        + ", ".join(f"Tensor? {name}=None" for name in SETTINGS)
        + ") -> Tensor",
        eager=_named(_eager),
        fake=lambda logits, *args, **kwargs: logits.new_empty(logits.shape[:1], dtype=torch.int64),
        implementations=(
            registry.Implementation("host_cpp", ("cpu",), _named(_run), _named(host.refuses)),
            registry.Implementation("triton", ("cuda", "gcu"), _named(_run_triton), _named(triton.refuses)),
        ),
    )
)
