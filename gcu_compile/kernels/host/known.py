"""Layers of quantised weights that a kernel has met: what was checked of them is not checked again.

A product of few rows takes 5 to 20 us; to look at its tensors in Python takes as long again, and longer in a model,
where the weights of one product have swept the code of the next out of the caches. So little is looked at here: a
layer's tensors come back at every step, and while they are the same and lie as they lay, so is what was found.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

OrNone = torch.Tensor | None


class Known:
    """What was found of layers, by their weight; forgotten with it."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}

    def find(self, weight: torch.Tensor, scales: torch.Tensor, zeros: OrNone, bias: OrNone) -> Any:
        """What `keep` was given for these tensors, if none of them was replaced, moved or took another form since."""
        kept = self._kept.get(id(weight))
        if (
            kept is not None
            and kept.weight() is weight
            and kept.scales is scales
            and kept.zeros is zeros
            and kept.bias is bias
            # `_form` of the two that are always there, without its call
            and (weight.data_ptr(), weight.shape, weight.dtype, weight.is_contiguous()) == kept.of_weight
            and (scales.data_ptr(), scales.shape, scales.dtype, scales.is_contiguous()) == kept.of_scales
            and (zeros is None or _form(zeros) == kept.of_zeros)
            and (bias is None or _form(bias) == kept.of_bias)
        ):
            return kept.found
        return None

    def keep(self, found: Any, weight: torch.Tensor, scales: torch.Tensor, zeros: OrNone, bias: OrNone) -> None:
        """`found` must not depend on the tensors' values, which may change."""
        key = id(weight)
        reference = weakref.ref(weight, lambda _: self._kept.pop(key, None))
        self._kept[key] = Kept(found, reference, weight, scales, zeros, bias)


class Kept:
    """One layer. All but the weight are held, so that no other tensor takes the place of one that was freed."""

    __slots__ = ("bias", "found", "of_bias", "of_scales", "of_weight", "of_zeros", "scales", "weight", "zeros")

    def __init__(self, found, reference, weight, scales, zeros, bias):
        self.found, self.weight, self.scales, self.zeros, self.bias = found, reference, scales, zeros, bias
        self.of_weight, self.of_scales, self.of_zeros, self.of_bias = map(_form, (weight, scales, zeros, bias))


def as_they_lie(given: tuple[OrNone, ...], read: tuple[OrNone, ...]) -> bool:
    """Whether a kernel reads the tensors that it was given, and none that was made of them."""
    pairs = zip(given, read, strict=True)
    return all(a is b or (a.data_ptr() == b.data_ptr() and a.dtype is b.dtype) for a, b in pairs)


def _form(tensor: OrNone) -> tuple | None:
    """Where and how it lies: the same array of numbers, as long as this is the same."""
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.is_contiguous())
