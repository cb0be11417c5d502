"""The integer layers of a compressed-tensors checkpoint, one at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from gcu_compile.errors import CheckpointError
from gcu_compile.kernels.dequant_gemm import layouts

# layouts of `weight_packed` by bits; w8a8 stores plain int8 instead
PACKED = {4: "int4_rows_i32", 8: "int8_rows_i32"}


class Stored:
    """The layers in a folder's .safetensors files."""

    def __init__(self, folder: Path, bits: int, group_size: int | None):
        from safetensors import safe_open

        self._open, self._bits, self._group_size = safe_open, bits, group_size
        self._files = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                self._files.update(dict.fromkeys(tensors.keys(), file))

    def __contains__(self, name: str) -> bool:
        """Whether the weight `name` is stored as integers."""
        return f"{name.removesuffix('.weight')}.weight_scale" in self._files

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise CheckpointError(f"there is no {name} among the quantised layers")
        with self._open(self._files[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def codes(
        self, name: str, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [N, K] int16, scales and zeros (or None) [N, K / group size] of the weight `name` of `shape` [N, K].

        Raises:
            CheckpointError: no such layer, or another number of scales.
        """
        base, (n, k) = name.removesuffix(".weight"), shape
        scales = self._tensor(f"{base}.weight_scale").view(n, -1)
        if scales.shape[1] != k // (self._group_size or k):
            raise CheckpointError(f"{base}.weight_scale has {scales.shape[1]} scales an output")
        if f"{base}.weight_packed" not in self._files:
            return self._tensor(name).to(torch.int16), scales, None
        layout = layouts.get(PACKED[self._bits])
        codes = layouts.unpack(self._tensor(f"{base}.weight_packed"), layout, n, k)
        zeros = None
        if f"{base}.weight_zero_point" in self._files:
            words = self._tensor(f"{base}.weight_zero_point").T.contiguous()
            zeros = layouts.unpack(words, layout, scales.shape[1], n).T.to(torch.int16) - layout.midpoint
        return codes.to(torch.int16) - layout.midpoint, scales, zeros

    def numbers(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """The weight that codes and scales stand for, [N, K] float32."""
        return dequantised(*self.codes(name, shape))


def dequantised(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """codes [N, K], less zeros [N, G], times scales [N, G] of K / G inputs each, float32."""
    n, k = codes.shape
    groups = codes.view(n, scales.shape[1], -1)
    if zeros is not None:
        groups = groups - zeros.unsqueeze(-1)
    return (groups * scales.to(torch.float32).unsqueeze(-1)).view(n, k)
