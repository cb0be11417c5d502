"""Inductor's scheduling and wrapper for the device: what Inductor may fuse, and which operations it must not write.

Sort, scan and random numbers have no fast lowering on the card: they stay calls of the vendor's operations.
"""

from __future__ import annotations

from torch._inductor.codegen.common import BackendFeature
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch.utils._ordered_set import OrderedSet


class GcuScheduling(TritonScheduling):
    """Triton scheduling without the features that the card lacks."""

    backend_features = OrderedSet([BackendFeature.INPLACE_BUFFERS])


class GcuWrapper(PythonWrapperCodegen):
    """The wrapper of the device; a class of its own, so that a registration can be recognised as ours."""
