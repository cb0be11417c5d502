"""PyTorch's own operator samples, run on the CPU and on the emulated card."""

from __future__ import annotations

from itertools import islice

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

# Entries that cannot be compared, and why.
UNINITIALISED = "empty empty_like empty_permuted empty_strided new_empty new_empty_strided resize_ resize_as_"
LEFT_OUT = {
    **dict.fromkeys(UNINITIALISED.split(), "values of uninitialised memory"),
    **dict.fromkeys(("sparse.sampled_addmm", "sparse.mm", "to_sparse"), "the card has no sparse tensors"),
    "as_strided": "samples share storage, which a copy to the card does not",
    "linalg.lstsq": "its default LAPACK driver is another one on devices that are not the CPU",
    "broadcast_shapes": "no tensors",
    "tensor_split": "wants its indices on the CPU, whatever the device",
}
if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"):
    LEFT_OUT["torch._scaled_mm_v2"] = "this torch (2.11) has no CPU kernel of it, though its entry says so"
# Entries whose gradients are equal only up to the order of a sum, and why.
OTHER_ORDER = {
    "linalg.eig": "float32 times complex64: torch lays out the result after promoting on the CPU, before it elsewhere, "
    "and the matrix product that follows adds in another order for another layout"
}
DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64)


def entries() -> dict[str, object]:
    """Entries of the database by name."""
    found = {}
    for op in op_db:
        on_host = op.supported_dtypes("cpu")  # empty: kernels for NVIDIA GPUs only
        if op.name not in LEFT_OUT and on_host and not op.name.startswith("jiterator"):
            found[op.formatted_name.replace(".", "_")] = op
    return found


def dtype_of(op) -> torch.dtype:
    """The first of `DTYPES` that the operator has on the CPU."""
    return next((d for d in DTYPES if d in op.supported_dtypes("cpu")), next(iter(op.supported_dtypes("cpu"))))


def on_card(sample):
    """The sample with its tensors, and the device that it may name, on the card."""

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to("gcu").requires_grad_(value.requires_grad)

    there = sample.transform(move)
    there.kwargs = {name: "gcu" if name == "device" else value for name, value in there.kwargs.items()}
    if not any(isinstance(value, torch.Tensor) for value in tree_leaves((there.input, there.args, there.kwargs))):
        there.kwargs["device"] = "gcu"  # a factory, which would make a CPU tensor
    there.args = tuple("gcu" if isinstance(value, str) and value == "cpu" else value for value in there.args)
    return there


def compare(name: str, samples: int | None) -> int:
    """Run up to `samples` samples (None: all) on both devices; the CPU's kernels do the work on both, so results, those
    of the in-place variant, and gradients are equal.

    Returns: how many samples ran.
    """
    op = entries()[name]
    dtype = dtype_of(op)
    with sdpa_kernel(SDPBackend.MATH):  # the CPU would take flash attention, which no card shares with it
        return _compare(op, dtype, samples)


def _compare(op, dtype: torch.dtype, samples: int | None) -> int:
    count = 0
    for sample in islice(op.sample_inputs("cpu", dtype), samples):
        both(op.op, sample)
        if op.inplace_variant is not None and inplace(op, sample):
            both(op.inplace_variant, sample)
        count += 1
    if op.supports_autograd and dtype.is_floating_point:
        for sample in islice(op.sample_inputs("cpu", dtype, requires_grad=True), 1):
            rounded = {"rtol": 1.3e-6, "atol": 1e-5} if op.name in OTHER_ORDER else {}  # torch.testing's, of float32
            equal(gradients(op, on_card(sample)), gradients(op, sample), **rounded)
    return count


def both(function, sample) -> None:
    """Call on both devices after the same seed, and compare."""
    there = on_card(sample)
    torch.manual_seed(0)
    expected = call(function, sample.transform(clone))
    torch.manual_seed(0)
    equal(call(function, there), expected)


def gradients(op, sample) -> list[torch.Tensor]:
    """Of the sum of all outputs, for each tensor of the sample that wants one."""
    wants = []

    def leaf(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().requires_grad_(value.requires_grad)
        wants.extend([value] if value.requires_grad else [])
        return value

    sample = sample.transform(leaf)
    if not wants:
        return []
    torch.manual_seed(0)
    out = op.gradcheck_wrapper(op.op, sample.input, *sample.args, **sample.kwargs)
    out = sample.output_process_fn_grad(out)
    outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    found = torch.autograd.grad([t.real.sum() if t.is_complex() else t.sum() for t in outs], wants, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def inplace(op, sample) -> bool:
    """Whether the operator's in-place variant takes this sample."""
    try:
        return isinstance(call(op.inplace_variant, sample.transform(clone)), torch.Tensor)
    except (RuntimeError, TypeError, IndexError):
        return False


def clone(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def call(function, sample):
    return function(sample.input, *sample.args, **sample.kwargs)


def equal(got, expected, rtol: float = 0, atol: float = 0) -> None:
    """Equal values, and every tensor of `got` on the card."""
    if isinstance(expected, torch.Tensor):
        assert got.device.type == "gcu", f"result is on {got.device}"
        assert got.shape == expected.shape
        assert got.stride() == expected.stride(), (got.stride(), expected.stride())
        if expected.layout == torch.strided:
            assert_close(got.cpu(), expected, rtol=rtol, atol=atol, equal_nan=True)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            equal(one, other, rtol, atol)
    else:
        assert got == expected or (got != got and expected != expected)
