"""A plain PyTorch model, without vLLM and without an import of gcu_compile: the backend is found by its name.

    python examples/plain_pytorch.py
"""

import torch
from torch import nn


class Block(nn.Module):
    """RMSNorm, then a gated MLP with a residual: [..., width] -> [..., width]."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def main() -> None:
    torch.manual_seed(0)
    model = Block().eval()
    compiled = torch.compile(model, backend="gcu", dynamic=True)
    with torch.no_grad():
        for rows in (1, 7, 32):
            x = torch.randn(rows, 64)
            difference = (compiled(x) - model(x)).abs().max().item()
            print(f"{rows:3d} rows: largest difference from eager {difference:.1e}")


if __name__ == "__main__":
    main()
