"""What the tests of quantised spellings share: compile one, hold it against plain torch, and say what became of it."""

import torch

from gcu_compile import backend
from gcu_compile.kernels.tolerance import tolerance

N, K, G = 48, 64, 4
FLOATS = [torch.float32, torch.bfloat16]


def run(fn, *args, rule="dequant_gemm", inductor=False, dynamic=None):
    """(report, result) of compiling `fn`, after the result was held against plain torch in float64-like steps."""
    torch._dynamo.reset()
    backend.reports.clear()
    compiled = torch.compile(fn, backend="gcu", fullgraph=True, dynamic=dynamic, options={"inductor": inductor})
    with torch.no_grad():
        actual, expected = compiled(*args), fn(*args)
    scale = max(1.0, expected.abs().float().mean().item())
    torch.testing.assert_close(actual, expected, **tolerance(actual.dtype, K, scale))
    report = backend.reports[-1]
    return [m for m in report.matches if m.rule == rule], actual


def fused(*args, **kwargs):
    (match,), _ = run(*args, **kwargs)
    assert match.status == "fused", match.reason


def near_miss(reason, *args, **kwargs):
    (match,), _ = run(*args, **kwargs)
    assert match.status == "near_miss" and reason in match.reason, (match.status, match.reason)


def data(dtype=torch.float32, groups=G, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(3, K, generator=g).to(dtype),
        "codes": torch.randint(0, 16, (N, K), generator=g),
        "scales": ((torch.rand(groups, N, generator=g) + 0.5) / 32).to(dtype),
        "zeros": torch.randint(0, 16, (groups, N), generator=g),
        "bias": torch.randn(N, generator=g).to(dtype),
    }
