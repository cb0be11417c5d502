"""`torch.compile(backend="gcu")` for any PyTorch model on the host target."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from gcu_compile import backend
from gcu_compile.kernels.tolerance import tolerance


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every graph is lowered anew: a hit in the cache lowers nothing, and so reports nothing."""
    monkeypatch.setenv("GCU_COMPILE_CACHE", "0")
    torch._dynamo.reset()
    backend.reports.clear()
    yield
    torch._dynamo.reset()


class Gated(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.up, self.down = nn.Linear(16, 32, dtype=dtype), nn.Linear(32, 16, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


def close(actual, model, x, length=64):
    """`actual` against the model in float64."""
    import copy

    expected = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(actual.double(), expected, **tolerance(actual.dtype, length, scale=4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inductor", [True, False])
def test_same_answer_as_the_model(dtype, inductor):
    model, x = Gated(dtype), torch.randn(5, 16, dtype=dtype)
    with torch.no_grad():
        close(torch.compile(model, backend="gcu", options={"inductor": inductor})(x), model, x)
    assert [report.inference for report in backend.reports] == [True]


def test_dynamic_shapes_compile_once():
    model = Gated()
    compiled = torch.compile(model, backend="gcu", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 7, 2, 31):
            x = torch.randn(rows, 16)
            close(compiled(x), model, x)
    assert len(backend.reports) == 1


def test_graph_break_makes_two_graphs_and_fullgraph_refuses_it():
    def broken(x):
        x = torch.relu(x) + 1
        torch._dynamo.graph_break()
        return torch.sin(x) * 2

    x = torch.randn(4, 4)
    torch.testing.assert_close(torch.compile(broken, backend="gcu")(x), broken(x))
    assert len(backend.reports) == 2
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="gcu", fullgraph=True)(x)


def test_mutated_inputs_and_buffers_are_written_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, cache, x):
            self.seen += x.shape[0]
            cache[: x.shape[0]].copy_(x * 2)
            return cache.sum()

    model = Counting()
    compiled = torch.compile(model, backend="gcu")
    cache, x = torch.zeros(6, 3), torch.randn(4, 3)
    total = compiled(cache, x)
    torch.testing.assert_close(cache[:4], x * 2)
    torch.testing.assert_close(total, (x * 2).sum())
    assert model.seen.item() == 4


def test_a_module_may_be_an_argument():
    inner, x = nn.Linear(4, 4), torch.randn(2, 4)
    compiled = torch.compile(lambda m, y: m(y).relu(), backend="gcu")
    with torch.no_grad():
        torch.testing.assert_close(compiled(inner, x), inner(x).relu())


def test_training_has_the_right_gradients_and_the_report_says_so():
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(5, 16)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="gcu")(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    assert backend.reports and not any(report.inference or report.steps for report in backend.reports)


def test_unknown_option_and_rule_are_refused():
    x = torch.randn(2)
    for options, word in (({"shadw": "1"}, "shadow"), ({"disable_rules": ["noop_veiw"]}, "noop_view")):
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match=f"UnknownNameError: unknown .* Did you mean '{word}'"):
            torch.compile(lambda x: x + 1, backend="gcu", options=options)(x)


def test_a_card_without_torch_gcu_names_the_remedy():
    with pytest.raises(BackendCompilerFailed, match=r"TargetUnavailableError.*torch_gcu.*GCU_COMPILE_TARGET=host"):
        torch.compile(lambda x: x + 1, backend="gcu", options={"target": "gcu300"})(torch.ones(2))
