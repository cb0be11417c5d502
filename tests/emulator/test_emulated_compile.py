"""`torch.compile(backend="gcu")` on the emulated card: Inductor's kernels for the card, run in Triton's interpreter."""

import pytest
import torch
from emulated import on_card

from gcu_compile.kernels.tolerance import tolerance

SHAPES = ((37, 64, 96), (1, 65, 3), (128, 128, 128))


def block(x, w, b):
    y = torch.nn.functional.layer_norm(x @ w, (w.shape[1],), b)
    return torch.nn.functional.silu(y) * 2 + torch.softmax(y, -1)


def rms_norm(x, weight):
    mean = x.float().pow(2).mean(-1, keepdim=True)
    return (x.float() * torch.rsqrt(mean + 1e-6)).to(x.dtype) * weight


def inputs(shape, dtype):
    rows, depth, columns = shape
    torch.manual_seed(0)
    return [torch.randn(size, dtype=dtype) for size in ((rows, depth), (depth, columns), (columns,))]


def run(function, arguments, **options):
    """The compiled function's result, which was on the card."""
    from gcu_compile import backend

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(function, backend="gcu", fullgraph=True, options=options)
        result = compiled(*(value.to("gcu") for value in arguments))
    assert result.device.type == "gcu"
    assert backend.recordings[-1].target == "gcu300"
    return result.cpu()


@on_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_kernels_equal_a_float64_reference(shape, dtype):
    arguments = inputs(shape, dtype)
    result = run(rms_norm, (arguments[0], arguments[0][0]))
    x = arguments[0].double()
    normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = normalised * arguments[0][0].double()
    torch.testing.assert_close(result.double(), expected, **tolerance(dtype, shape[1], scale=expected.abs().max()))


@on_card
def test_kernels_and_library_calls_in_one_graph():
    arguments = inputs(SHAPES[0], torch.float32)
    expected = block(*(value.double() for value in arguments))
    for options in ({}, {"inductor": False}):
        result = run(block, arguments, **options)
        bounds = tolerance(torch.float32, SHAPES[0][1], scale=float(expected.abs().max()))
        torch.testing.assert_close(result.double(), expected, **bounds)


@on_card
def test_generated_kernels_go_through_the_checked_launch():
    from gcu_compile.targets.emulator import launch

    seen, original = [], launch.launch
    launch.launch = lambda kernel, grid, *args, **kwargs: (seen.append(grid), original(kernel, grid, *args, **kwargs))
    try:
        run(block, inputs((16, 64, 64), torch.float32))
    finally:
        launch.launch = original
    assert seen and all(size <= 24 for (size, *_) in seen)


@on_card
def test_rules_fire_for_the_card_too():
    from gcu_compile import backend

    def attention(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = (torch.randn(1, 2, 16, 32) for _ in range(3))
    result = run(attention, (q, k, v))
    assert sum(backend.reports[-1].fused.values()) > 0, backend.reports[-1].matches
    expected = attention(q.double(), k.double(), v.double())
    bounds = tolerance(torch.float32, 32, scale=float(expected.abs().max()))
    torch.testing.assert_close(result.double(), expected, **bounds)


@on_card
def test_the_other_cards_tensors_run_on_the_other_card():
    x = torch.randn(8, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(torch.nn.functional.silu, backend="gcu")(x.to("gcu:1"))
    assert result.device == torch.device("gcu", 1) and torch.gcu.current_device() == 0
    torch.testing.assert_close(result.cpu(), torch.nn.functional.silu(x), **tolerance(torch.float32))


@on_card
def test_a_target_that_is_not_here_is_refused():
    with pytest.raises(Exception, match="target 'gcu400' was asked for, and the card here is 'gcu300'"):
        torch.compile(lambda x: x + 1, backend="gcu", options={"target": "gcu400"})(torch.ones(3, device="gcu"))
