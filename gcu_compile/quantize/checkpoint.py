"""Writes a checkpoint's files with its linear layers as integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gcu_compile.errors import CheckpointError
from gcu_compile.kernels.dequant_gemm import layouts
from gcu_compile.quantize.rounding import Format
from gcu_compile.quantize.source import Layers
from gcu_compile.quantize.stored import PACKED, dequantised

# A weight's name and the weight [N, K] -> its codes [N, K], scales [N, G], and zeros [N, G] or None.
Codes = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


@dataclass
class LayerError:
    """How far a layer's dequantised weight Q is from its weight W.

    `relative`: |W - Q| / |W| in the Frobenius norm; `largest`: the largest difference of an element; `outputs`:
    |x W^T - x Q^T| / |x W^T| on texts (None: no texts, or, of an expert, no layer of its own in transformers).
    """

    name: str
    relative: float
    largest: float
    outputs: float | None = None


class Writer:
    """Writes a checkpoint's files; keeps layers' `errors`, the file `where` each tensor lies, the `bytes` in all."""

    def __init__(self, form: Format, codes: Codes, layers: Layers, wrote: Callable[[str], None]):
        """`wrote` is called with the name of each weight of `layers` that is done."""
        self._form, self._codes, self._layers, self._wrote = form, codes, layers, wrote
        self.errors: list[LayerError] = []
        self.where: dict[str, str] = {}
        self.bytes = 0

    def write(self, shard: Path, out: Path, more: dict[str, torch.Tensor]) -> None:
        """The file `shard` of a float checkpoint, quantised, with the tensors `more`, as the file `out`."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        tensors = {}
        with safe_open(shard, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 (safe_open has no iterator)
                if name in self._layers.linears:
                    tensors |= self._layer(name, file.get_tensor(name))
                    self._wrote(name)
                elif name in self._layers.parts:
                    stacked = file.get_slice(name)
                    for part, place in self._layers.parts[name].items():
                        tensors |= self._layer(part, stacked[place].T.contiguous())
                        self._wrote(part)
                else:
                    tensors[name] = file.get_tensor(name)
        tensors |= more
        save_file(tensors, out, metadata=metadata)
        self.where.update(dict.fromkeys(tensors, out.name))
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())

    def _layer(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that stand for a weight [N, K]; notes how far they are from it."""
        n, k = weight.shape
        whole = weight.to(torch.float32)
        if not bool(torch.isfinite(whole).all()):
            raise CheckpointError(f"{name}: the weight holds NaN or infinity")
        codes, scales, zeros = self._codes(name, weight)
        difference = dequantised(codes, scales, zeros) - whole
        norm = whole.norm().item()
        base = name.removesuffix(".weight")
        relative = difference.norm().item() / norm if norm else 0.0
        self.errors.append(LayerError(base, relative, difference.abs().max().item()))
        if self._form.activations:
            return {f"{base}.weight": codes.to(torch.int8), f"{base}.weight_scale": scales}
        layout = layouts.get(PACKED[self._form.bits])
        tensors = {
            f"{base}.weight_packed": layouts.pack_blocks(codes, layout),
            f"{base}.weight_scale": scales,
            f"{base}.weight_shape": torch.tensor([n, k]),
        }
        if zeros is not None:  # words along the outputs
            if n % layout.per_word:
                raise CheckpointError(
                    f"{base} has {n} outputs, and words of 32 bits hold {layout.per_word} of their zeros: leave out "
                    "--asymmetric"
                )
            packed = layouts.pack(zeros.T.long() + layout.midpoint, layout)
            tensors[f"{base}.weight_zero_point"] = packed.T.contiguous()
        return tensors
