"""`torch.ops.gcu.sample`, `rejection_sample` and `logprobs`: the logits chain as one operation, without a sort and in
the logits' own precision."""

from __future__ import annotations

import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.host import sample as host
from gcu_compile.kernels.sampling import eager, logprobs_eager, rejection_eager
from gcu_compile.kernels.sampling.check import SETTINGS, check, check_lists
from gcu_compile.kernels.sampling.known import direct
from gcu_compile.kernels.triton import logprobs as triton_logprobs
from gcu_compile.kernels.triton import rejection as triton_rejection
from gcu_compile.kernels.triton import sample as triton


def _named(function):
    """The operation passes settings by position; implementations take them by name."""

    def call(logits, seeds, positions, *values, **settings):
        return function(
            logits, seeds=seeds, positions=positions, **dict(zip(SETTINGS, values, strict=False)), **settings
        )

    return call


def _by_logits(refuses):
    """What refuses by the logits alone, for calls with all arguments."""
    return lambda logits, *args, **kwargs: refuses(logits)


def _run(logits, **settings):
    check("sample", logits, settings)
    return host.run(logits, **settings)


def _run_triton(logits, **settings):
    check("sample", logits, settings)
    return triton.run(logits, **settings)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether its values may be looked at: a fake tensor has none, and reading a device's would wait for it."""
    return tensor.device.type == "cpu" and not isinstance(tensor, torch._subclasses.FakeTensor)


def _eager(logits, **settings):
    if has_values(logits):
        check("sample", logits, settings)
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
            registry.Implementation("host_cpp", ("cpu",), _named(_run), _by_logits(host.refuses), direct),
            registry.Implementation("triton", ("cuda", "gcu"), _named(_run_triton), _by_logits(triton.refuses)),
        ),
    )
)


def check_drafts(logits, draft_ids, draft_offsets, bonus_ids, length, draft_probabilities, values: bool) -> None:
    """Raise `InvalidInputError` for drafts that do not fit the logits. `values`: look into the tensors, too."""
    drafts, vocab = logits.shape
    if draft_ids.shape != (drafts,):
        raise InvalidInputError(f"gcu::rejection_sample: draft_ids is {tuple(draft_ids.shape)}, expected [{drafts}]")
    if draft_offsets.shape != (len(bonus_ids) + 1,):
        shapes = f"{tuple(draft_offsets.shape)} and {tuple(bonus_ids.shape)}"
        raise InvalidInputError(f"gcu::rejection_sample: draft_offsets and bonus_ids do not fit together: {shapes}")
    if draft_probabilities is not None and draft_probabilities.shape != logits.shape:
        shape = tuple(draft_probabilities.shape)
        raise InvalidInputError(
            f"gcu::rejection_sample: draft_probabilities is {shape}, expected {tuple(logits.shape)}"
        )
    if not values:
        return
    counts = draft_offsets.diff()
    if int(draft_offsets[0]) or int(draft_offsets[-1]) != drafts or bool(((counts < 0) | (counts > length)).any()):
        raise InvalidInputError(
            f"gcu::rejection_sample: draft_offsets do not cut {drafts} drafts into requests of up to {length}"
        )
    if drafts and not 0 <= int(draft_ids.min()) <= int(draft_ids.max()) < vocab:
        raise InvalidInputError(f"gcu::rejection_sample: draft_ids leave the vocabulary of {vocab}")


def _reject(run):
    """`run` finds each draft's token; checks before it and the requests' rows after it are the same for all."""

    def call(logits, draft_ids, draft_offsets, bonus_ids, seeds, positions, length, probabilities=None, *rest, **named):
        asked = {"seeds": seeds, "positions": positions, **dict(zip(SETTINGS, rest, strict=False)), **named}
        probabilities = asked.pop("draft_probabilities", probabilities)
        check("rejection_sample", logits, asked)
        check_drafts(logits, draft_ids, draft_offsets, bonus_ids, length, probabilities, has_values(logits))
        found = run(logits, draft_ids=draft_ids, draft_probabilities=probabilities, **asked)
        return rejection_eager.assemble(found, draft_ids.long(), draft_offsets, bonus_ids, length)

    return call


def _tokens(logits, **asked):
    if has_values(logits):
        check_lists(*logits.shape, asked)
    return rejection_eager.tokens(logits, **asked)


def _host_tokens(logits, draft_ids, draft_probabilities, **asked):
    if draft_probabilities is None:
        return host.run(logits, **asked)
    return host.run(logits, draft_ids=draft_ids, draft_probabilities=draft_probabilities, **asked)


def _triton_tokens(logits, draft_ids, draft_probabilities, **asked):
    if draft_probabilities is None:  # a draft is accepted where it is what `gcu::sample` draws
        return triton.run(logits, **asked)
    return triton_rejection.run(logits, draft_ids, draft_probabilities, **asked)


REJECTION_SAMPLE = registry.register(
    registry.FusedOp(
        "rejection_sample",
        "(Tensor logits, Tensor draft_ids, Tensor draft_offsets, Tensor bonus_ids, Tensor seeds, Tensor positions, "
        "SymInt length, Tensor? draft_probabilities=None, "
        + ", ".join(f"Tensor? {name}=None" for name in SETTINGS)
        + ") -> Tensor",
        eager=_reject(_tokens),
        fake=lambda logits, ids, offsets, bonus, seeds, positions, length, *args, **kwargs: logits.new_empty(
            (bonus.shape[0], length + 1), dtype=torch.int64
        ),
        implementations=(
            registry.Implementation("host_cpp", ("cpu",), _reject(_host_tokens), _by_logits(host.refuses)),
            registry.Implementation("triton", ("cuda", "gcu"), _reject(_triton_tokens), _by_logits(triton.refuses)),
        ),
    )
)


def check_tokens(logits: torch.Tensor, token_ids: torch.Tensor, count: int) -> None:
    """Raise `InvalidInputError` for tokens that do not fit the logits; touches no values."""
    if token_ids.dim() != 2 or token_ids.shape[0] != logits.shape[0] or token_ids.shape[1] == 0 or count < 0:
        shapes = f"{tuple(token_ids.shape)}, expected [{logits.shape[0]}, 1 or more]; count is {count}"
        raise InvalidInputError(f"gcu::logprobs: token_ids is {shapes}")


def _scored(run):
    def call(logits, token_ids, count, normalised, *values, **settings):
        asked = dict(zip(SETTINGS, values, strict=False)) | settings
        check("logprobs", logits, asked)
        check_tokens(logits, token_ids, count)
        return run(logits, token_ids, count, normalised, **asked)

    return call


def _logprobs(logits, token_ids, count, normalised, **asked):
    if has_values(logits):
        check_lists(*logits.shape, asked)
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < logits.shape[1]:
            raise InvalidInputError(f"gcu::logprobs: token_ids leave the vocabulary of {logits.shape[1]}")
    return logprobs_eager.logprobs(logits, token_ids, count, normalised, **asked)


def _fake_logprobs(logits, token_ids, count, *args, **kwargs):
    width = token_ids.shape[1] + torch.sym_min(count, logits.shape[1])
    return (
        logits.new_empty((logits.shape[0], width), dtype=torch.int32),
        logits.new_empty((logits.shape[0], width), dtype=torch.float32),
        logits.new_empty(logits.shape[:1], dtype=torch.int64),
    )


LOGPROBS = registry.register(
    registry.FusedOp(
        "logprobs",
        "(Tensor logits, Tensor token_ids, SymInt count, bool normalised, "
        + ", ".join(f"Tensor? {name}=None" for name in SETTINGS)
        + ") -> (Tensor, Tensor, Tensor)",
        eager=_scored(_logprobs),
        fake=_fake_logprobs,
        accumulation=lambda logits, *args, **kwargs: logits.shape[1],
        implementations=(
            registry.Implementation("host_cpp", ("cpu",), _scored(host.run_logprobs), _by_logits(host.refuses)),
            registry.Implementation("triton", ("cuda", "gcu"), _scored(triton_logprobs.run), triton_logprobs.refuses),
        ),
    )
)
