"""A graph gives, bit for bit, what the compiled function gives; what cannot be one is refused with the reason."""

import dataclasses
import threading

import pytest
import torch
from torch.nn.functional import embedding, silu

from gcu_compile.kernels.host import build
from gcu_compile.kernels.linear import pack
from gcu_compile.replay import capture as capture_module
from gcu_compile.replay import generated_private
from gcu_compile.replay.capture import CannotCaptureError, Capture
from gcu_compile.replay.graph import KernelGraph, Workspace

SIZE = 96


@pytest.fixture(autouse=True)
def for_inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return [torch.randn(SIZE, SIZE) / SIZE**0.5 for _ in range(3)]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="gcu", dynamic=False)


def captured(function, *inputs):
    """A capture of one run, and what it returned; the function was run before."""
    function(*inputs)
    capture = Capture()
    with capture:
        output = function(*inputs)
    return capture, output


def products_of_ours(weights):
    """Our products and Inductor's kernels between them: a graph without Python."""
    packed = [pack(w.bfloat16()) for w in weights]

    def f(x):
        for w in packed:
            x = silu(torch.ops.gcu.linear(x, w, SIZE)) + x
        return x

    return f, packed, torch.bfloat16


def products_of_torch(weights):
    """Products that torch makes: they are called again from Python, with tensors in their new places."""

    def f(x):
        for w in weights:
            x = silu(x @ w) + x
        return x

    return f, weights, torch.float32


def operations_with_results(weights):
    """Operations that return new tensors, some of them two."""

    def f(x):
        for w in weights:
            values, _ = torch.topk(x @ w, SIZE)
            x = torch.sort(silu(values) + x, -1)[0] * 2
        return x

    return f, weights, torch.float32


KINDS = (products_of_ours, products_of_torch, operations_with_results)


@pytest.mark.parametrize("rows", (1, 3, 16))
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_what_the_function_gives(kind, rows, weights):
    f, held, dtype = kind(weights)
    f = compiled(f)
    x = torch.randn(rows, SIZE).to(dtype)
    capture, output = captured(f, x)
    assert capture.refused is None
    graph = KernelGraph(capture, [x], held, output)
    assert graph.used == set(range(len(held)))
    for _ in range(3):
        x.copy_(torch.randn(rows, SIZE))
        graph.poison()
        assert graph.replay([x]) is None
        assert torch.equal(graph.output, f(x))


def test_intermediate_results_share_memory(weights):
    f, held, dtype = products_of_ours(weights * 4)
    x = torch.randn(8, SIZE).to(dtype)
    capture, output = captured(compiled(f), x)
    made = sum(tensor.untyped_storage().nbytes() for tensor in capture.intermediates)
    assert KernelGraph(capture, [x], held, output)._block.nbytes < made / 2


def test_inputs_may_lie_elsewhere(weights):
    f, held, dtype = products_of_ours(weights)
    f = compiled(f)
    z = torch.zeros(2, SIZE, dtype=dtype)  # held, so that its address is no other tensor's
    capture, output = captured(f, z)
    with pytest.raises(CannotCaptureError, match="memory of no tensor"):
        KernelGraph(capture, [torch.zeros(2, SIZE, dtype=dtype)], held, output)
    x, y = (torch.randn(2, SIZE).to(dtype) for _ in range(2))
    capture, output = captured(f, x)
    graph = KernelGraph(capture, [x], held, output)
    assert graph.replay([y]) is None
    assert torch.equal(graph.output, f(y))


def test_an_input_that_an_operation_takes_stays_where_it_is(weights):
    f, held, dtype = products_of_torch(weights)
    f, x = compiled(f), torch.randn(2, SIZE)
    capture, output = captured(f, x)
    graph = KernelGraph(capture, [x], held, output)
    assert graph.replay([torch.randn(2, SIZE)]) == "input 0 lies elsewhere"


def test_graphs_share_their_workspace(weights):
    f, held, dtype = products_of_ours(weights)
    f, workspace, graphs = compiled(f), Workspace(), []
    for rows in (1, 2):
        x = torch.randn(rows, SIZE).to(dtype)
        capture, output = captured(f, x)
        graphs.append((KernelGraph(capture, [x], held, output, workspace), x))
    for graph, x in graphs + graphs[::-1]:
        assert graph.replay([x]) is None
        assert torch.equal(graph.output, f(x))


def test_a_kernel_that_throws_says_what_and_the_next_run_is_as_good_as_ever():
    table = torch.randn(10, SIZE)
    f = compiled(lambda ids: embedding(ids, table) * 2)
    ids = torch.tensor([1, 2, 3])
    capture, output = captured(f, ids)
    graph = KernelGraph(capture, [ids], [table], output)
    ids[1] = 10
    assert "index out of bounds" in graph.replay([ids])
    ids[1] = 9
    assert graph.replay([ids]) is None
    assert torch.equal(graph.output, table[ids] * 2)


def test_calls_are_counted_as_often_as_they_run(weights):
    f, held, dtype = products_of_ours(weights)
    capture, _ = captured(compiled(f), torch.randn(1, SIZE).to(dtype))
    assert capture.counted == {("linear", "host_cpp"): len(weights)}


def refused(function, *inputs, held=()):
    capture, output = captured(function, *inputs)
    with pytest.raises(CannotCaptureError) as error:
        KernelGraph(capture, inputs, held, output)
    return str(error.value)


def test_an_operation_outside_a_wrapper_is_refused(weights):
    f = compiled(lambda x: silu(x) + 1)
    assert "aten::mul" in refused(lambda x: f(x) * 2, torch.randn(2, SIZE))


def test_a_number_read_from_a_tensor_is_refused():
    f = compiled(lambda x: silu(x) + 1)
    assert "aten::_local_scalar_dense" in refused(lambda x: (f(x), x[0, 0].item())[0], torch.randn(2, SIZE))


def test_random_numbers_are_refused():
    reason = refused(compiled(lambda x: torch.bernoulli(torch.sigmoid(x)) + x), torch.randn(2, SIZE))
    assert "random" in reason


def test_a_weight_that_nobody_holds_is_refused(weights):
    f, held, dtype = products_of_ours(weights)
    assert "gcu_linear reads or writes memory of no tensor" in refused(
        compiled(f), torch.randn(1, SIZE).to(dtype), held=held[1:]
    )


def test_a_result_that_was_there_before_is_refused():
    f = compiled(lambda x, y: silu(x) + y)
    assert refused(lambda x, y: (f(x, y), y)[1], torch.ones(2), torch.ones(2)) == "what it returns was there before"


@pytest.mark.parametrize("read", [torch.Tensor.tolist, torch.Tensor.numpy], ids=["tolist", "numpy"])
def test_numbers_that_python_reads_are_refused(read):
    f = compiled(lambda x: silu(x) + 1)
    assert "aten::resolve_" in refused(lambda x: (f(x), read(x))[0], torch.randn(2, SIZE))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_result_of_no_certain_size_is_refused():
    f = compiled(lambda x: silu(torch.nonzero(x).float()) + 1)
    assert "returns as many numbers as its input's values say" in refused(f, torch.tensor([0.0, 1.0, 2.0]))


def test_an_operation_that_fails_later_says_why(weights):
    f, held, _ = products_of_torch(weights)
    x = torch.randn(2, SIZE)
    capture, output = captured(compiled(f), x)
    first = next(call for call in capture.calls if call.name.startswith("extern_kernels"))

    def fails(*args, **kwargs):
        raise ValueError("no more")

    capture.calls[capture.calls.index(first)] = dataclasses.replace(first, function=fails)
    assert KernelGraph(capture, [x], held, output).replay([x]) == "ValueError: no more"


def test_inputs_that_share_memory_are_refused():
    f = compiled(lambda x, y: silu(x) + y)
    both = torch.randn(4, SIZE)
    assert refused(f, both[:2], both[2:]) == "two of its inputs share memory"


def test_a_function_that_is_not_known_is_refused(weights, monkeypatch):
    f, held, dtype = products_of_ours(weights)
    monkeypatch.setattr(capture_module, "layouts", dict)
    reason = refused(compiled(f), torch.randn(1, SIZE).to(dtype), held=held)
    assert reason == "it calls gcu_linear, whose arguments are not known"


def test_a_kernel_with_a_number_that_is_no_integer_is_refused():
    class Kernel:
        __self__ = generated_private
        __call__ = staticmethod(lambda *args: None)

    capture = Capture()
    capture._generated(Kernel())(torch.ones(2), 0.5)
    assert "takes a float" in capture.refused


def test_nothing_stays_patched(weights):
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    load = build.load
    with pytest.raises(KeyboardInterrupt), Capture():
        assert torch.empty is not empty
        raise KeyboardInterrupt
    assert (torch.empty, torch.Tensor.new_empty, build.load) == (empty, new_empty, load)
    assert not torch.autograd._profiler_enabled()


def test_one_run_is_captured_at_a_time(weights):
    load = build.load
    with Capture() as first, Capture() as second:
        pass
    assert first.refused is None and second.refused == "another run is being captured"
    assert build.load is load
    with Capture() as third:
        pass
    assert third.refused is None


def test_other_threads_are_not_noted(weights):
    f, held, dtype = products_of_ours(weights)
    f, x = compiled(f), torch.randn(1, SIZE).to(dtype)
    f(x)
    capture = Capture()
    with capture:
        other = threading.Thread(target=torch.inference_mode()(f), args=(x.clone(),))
        other.start()
        other.join()
        output = f(x)
    alone, _ = captured(f, x)
    assert [call.name for call in capture.calls] == [call.name for call in alone.calls]
    assert len(capture.intermediates) == len(alone.intermediates)
    assert torch.equal(output, f(x))
