"""`gcu::sample` on the CPU for arguments like those that were looked at before.

A draw for one row takes 10 us, and to look at up to seventeen tensors in Python takes as long again. From step to step
they have the same dtypes and shapes: what followed from those is kept, and a call reads no more than where they lie.
"""

from __future__ import annotations

import struct

import torch

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels.host import build
from gcu_compile.kernels.host import sample as host
from gcu_compile.kernels.host.forms_private import same_form
from gcu_compile.kernels.sampling.check import SETTINGS, check

LISTS = (("bias_ids", "bias_values", "bias_count"), ("history_ids", "history_counts", "history_count"))
_OF_ANY_LENGTH = frozenset(name for ids, values, _ in LISTS for name in (ids, values))
MOST_FORMS, MOST_NAMES = 8, 64  # batch sizes, say, for each set of settings; and such sets
_POINTER = torch.Tensor.data_ptr

# By what comes before the settings, and by their names.
_known: dict[tuple[str, ...], dict[tuple[str, ...], list[Form]]] = {
    ("logits", "seeds"): {},
    ("logits", "seeds", "positions"): {},
}


class Form:
    """Arguments of certain dtypes and shapes.

    Attributes:
        fits: of tensors in the order in which these came, whether they are like them.
        fields: the kernel's arguments, where what changes from call to call is missing.
        places, pack: where that belongs: the number of threads, the result, the lists' lengths, the tensors, and
            positions that are the seeds.
        lists: of each list that is there, which of the tensors are its ids and its values.
    """

    __slots__ = ("fields", "fits", "lists", "pack", "places")

    def __init__(self, fits, names: tuple[str, ...], fields: list[int]):
        self.fits = fits
        lists = [(ids, values, count) for ids, values, count in LISTS if ids in names and values in names]
        self.lists = tuple((names.index(ids), names.index(values)) for ids, values, _ in lists)
        changing = ("threads", "ids", *(count for *_, count in lists), *names)
        if "positions" not in names:
            changing += ("positions",)
        places = [host.FIELDS.index(name) for name in changing]
        self.fields = host.PACK(*fields)
        self.places = struct.pack(f"{1 + len(places)}q", len(places), *places)
        self.pack = struct.Struct(f"{len(places)}q").pack


def direct(logits, seeds, positions, *values, **settings) -> torch.Tensor | None:
    """`gcu::sample`, or None for arguments of which there is more to look at."""
    if values:
        given = {name: value for name, value in zip(SETTINGS, values, strict=False) if value is not None}
        settings = given | settings
    if positions is seeds:  # the check of forms takes no tensor twice
        first = ("logits", "seeds")
        tensors = (logits, seeds, *settings.values())
    else:
        first = ("logits", "seeds", "positions")
        tensors = (logits, seeds, positions, *settings.values())
    known = _known[first]
    forms = known.get(names := tuple(settings))
    form = forms[0] if forms and forms[0].fits(*tensors) else _find(known, first, names, tensors)
    if form is None:
        return None
    lengths = []
    for ids, other in form.lists:
        lengths.append(length := tensors[ids].numel())
        if tensors[other].numel() != length:
            return None
    library = build.load("sample")
    found = torch.empty_like(positions)
    pointers = map(_POINTER, tensors if positions is not seeds else (*tensors, positions))
    changing = form.pack(torch.get_num_threads(), found.data_ptr(), *lengths, *pointers)
    if library.gcu_sample_known(form.fields, form.places, changing):
        return None  # a list that leaves its rows or the vocabulary: whoever looks more closely says so
    return found


def _find(known, first: tuple[str, ...], names: tuple[str, ...], tensors: tuple[torch.Tensor, ...]) -> Form | None:
    """The form of `tensors`, those called `first` and then `names`; it is the first to be asked next time."""
    forms = known.get(names, ())
    form = next((form for form in forms if form.fits(*tensors)), None) or _look((*first, *names), tensors)
    if form is not None:
        if len(known) >= MOST_NAMES:
            known.clear()
        known[names] = [form, *(other for other in forms if other is not form)][:MOST_FORMS]
    return form


def _look(names: tuple[str, ...], tensors: tuple[torch.Tensor, ...]) -> Form | None:
    """What follows from the arguments' dtypes and shapes; None: `host.run` has to convert some, or to refuse them."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return None
    fits = same_form(tensors, tuple(name in _OF_ANY_LENGTH for name in names))
    logits, *rest = tensors
    asked = dict(zip(names[1:], rest, strict=True))
    # Of a stride that a list of one token may have a longer one is not contiguous.
    if fits is None or any(asked[name].stride() != (1,) for name in asked if name in _OF_ANY_LENGTH):
        return None
    try:
        check("sample", logits, asked)
    except InvalidInputError:
        return None
    if host.refuses(logits) is not None:
        return None
    fields, held = host.arguments(logits, asked)
    return None if held else Form(fits, names, fields)
