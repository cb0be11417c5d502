"""`torch.device("gcu")` in host memory behaves as a device does."""

import io
import os
import subprocess
import sys

import pytest
import torch
from emulated import on_card


@on_card
def test_properties_are_exactly_the_vendors():
    properties = torch.gcu.get_device_properties()
    assert set(properties._fields) == {
        "name", "major", "minor", "multi_processor_count", "total_memory", "max_threads_per_multi_processor",
        "sip_count",
    }  # fmt: skip
    assert not hasattr(properties, "gcnArchName") and not hasattr(properties, "warp_size")
    assert (properties.major, properties.sip_count) == (3, 24)
    assert torch.gcu.get_device_capability() == (3, 0)
    assert "emulated" in torch.gcu.get_device_name(1)
    with pytest.raises(AssertionError, match="Invalid device id 2"):
        torch.gcu.get_device_properties(2)


@on_card("gcu400")
def test_the_other_card():
    assert torch.gcu.get_device_capability() == (4, 0)
    assert torch.ones(3, device="gcu").sum().item() == 3


@on_card
def test_current_device():
    assert torch.gcu.device_count() == 2 and torch.gcu.current_device() == 0
    with torch.gcu.device(1):
        assert torch.zeros(1, device="gcu").device == torch.device("gcu", 1)
        with torch.gcu.device_of(torch.zeros(1, device="gcu:0")):
            assert torch.gcu.current_device() == 0
    assert torch.gcu.current_device() == 0
    with pytest.raises(RuntimeError, match="invalid device ordinal gcu:2"):
        torch.gcu.set_device(2)
    with pytest.raises(ValueError, match="Expected a gcu device"):
        torch.gcu.set_device("cpu")
    assert (torch.ones(2, device="gcu:1") + 1).device.index == 1


@on_card
def test_tensors_of_other_devices_are_refused():
    card = torch.ones(3, device="gcu")
    with pytest.raises(RuntimeError, match="gcu:0 and cpu"):
        card + torch.ones(3)
    with pytest.raises(RuntimeError, match="gcu:0 and gcu:1"):
        card + torch.ones(3, device="gcu:1")
    assert (card + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a CPU scalar is welcome, as on every card
    assert card[torch.tensor([0, 2])].tolist() == [1, 1]
    assert torch.ones(3, device="gcu:1").copy_(card * 5).tolist() == [5, 5, 5]


@on_card
def test_views_share_memory_and_writes_reach_it():
    base = torch.zeros(4, 6, device="gcu")
    base.t()[1:3].add_(1)
    base.view(24)[-1] = 7
    base[0, ::2].copy_(torch.tensor([1.0, 2, 3]))
    expected = torch.zeros(4, 6)
    expected.t()[1:3].add_(1)
    expected.view(24)[-1] = 7
    expected[0, ::2].copy_(torch.tensor([1.0, 2, 3]))
    assert torch.equal(base.cpu(), expected)
    assert base[1].data_ptr() == base.data_ptr() + 24 and base.detach()._base is None


@on_card
def test_views_keep_inference_tensors_and_normal_ones_apart():
    normal = torch.ones(4, device="gcu")
    with torch.inference_mode():
        made = normal + 1
        assert made.is_inference() and made[1:].is_inference()
        assert not normal[1:].is_inference()
    assert made.view(2, 2).is_inference() and not (made + 1).is_inference()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        made.add_(1)


@on_card
def test_resize_and_set():
    x = torch.arange(6.0, device="gcu")
    x.resize_(12)
    assert x[:6].tolist() == [0, 1, 2, 3, 4, 5] and x.device.type == "gcu"
    x.untyped_storage().resize_(4 * 20)
    assert x.untyped_storage().nbytes() == 80 and x[5].item() == 5
    y = torch.empty(0, device="gcu").set_(x.untyped_storage(), 1, (2, 2), (2, 1))
    y += 10
    assert x[:5].tolist() == [0, 11, 12, 13, 14]
    out = torch.empty(0, device="gcu")
    torch.add(x[:3], 1, out=out)
    assert out.tolist() == [1, 12, 13]


@on_card
def test_a_result_that_is_left_to_be_conjugated():
    """`solve` from the right writes X^H, and marks it: the mark is part of what it did to its output."""
    a, b = torch.randn(2, 4, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    x = torch.linalg.solve(a.to("gcu"), b.to("gcu"), left=False)
    assert torch.equal(x.cpu(), torch.linalg.solve(a, b, left=False))
    torch.testing.assert_close((x @ a.to("gcu")).cpu(), b, rtol=1e-4, atol=1e-4)


@on_card
def test_random_numbers_follow_the_seed_and_are_each_cards_own():
    torch.manual_seed(3)
    first = torch.randn(5, device="gcu"), torch.randn(5, device="gcu:1"), torch.randn(5)
    assert torch.equal(first[0].cpu(), first[2]) and torch.equal(first[1].cpu(), first[2])
    state = torch.gcu.get_rng_state()
    second = torch.nn.functional.dropout(torch.ones(64, device="gcu"))
    torch.gcu.set_rng_state(state)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64, device="gcu")), second)
    generator = torch.Generator(device="gcu").manual_seed(5)
    host = torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(4, generator=generator, device="gcu").cpu(), torch.rand(4, generator=host))
    with pytest.raises(RuntimeError, match="Expected a 'gcu' device type for generator"):
        torch.ones(3, device="gcu").normal_(generator=host)


@on_card
def test_streams_and_events():
    stream, start, end = torch.gcu.Stream(), torch.gcu.Event(enable_timing=True), torch.gcu.Event(enable_timing=True)
    assert stream != torch.gcu.default_stream() == torch.gcu.current_stream()
    start.record()
    with torch.gcu.stream(stream):
        assert torch.gcu.current_stream() == stream
        torch.ones(100, 100, device="gcu") @ torch.ones(100, 100, device="gcu")
    torch.gcu.current_stream().wait_stream(stream)
    end.record()
    end.synchronize()
    torch.gcu.synchronize()
    assert start.query() and start.elapsed_time(end) > 0
    assert torch.gcu.current_stream() == torch.gcu.default_stream()


@on_card
def test_save_load_pin_and_move():
    x, file = torch.randn(3, device="gcu:1"), io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    assert torch.load(file)["x"].device == x.device
    file.seek(0)
    assert torch.equal(torch.load(file, map_location="cpu")["x"], x.cpu())
    pinned = torch.ones(4).pin_memory()
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not torch.ones(4).is_pinned()
    if hasattr(torch.accelerator, "empty_host_cache"):  # not in torch 2.11
        torch.accelerator.empty_host_cache()
    assert torch.nn.Linear(2, 2).gcu().weight.is_gcu
    assert x.to(torch.bfloat16).to("cpu", torch.float64).dtype == torch.float64


@on_card
def test_autograd_reaches_leaves_on_the_card():
    x = torch.randn(4, 5, requires_grad=True)
    card = x.detach().to("gcu").requires_grad_()
    for value in (x, card):
        torch.nn.functional.layer_norm(value @ value.t(), (4,)).pow(2).sum().backward()
    assert card.grad.device.type == "gcu" and torch.equal(card.grad.cpu(), x.grad)


def run(code: str, **environ: str) -> subprocess.CompletedProcess:
    environ = {**os.environ, **environ}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)


def test_visible_devices():
    code = "from gcu_compile.targets import emulator; print(emulator.start('gcu300').count)"
    assert run(code, TOPS_VISIBLE_DEVICES="1").stdout == "1\n"
    bad = run(code, TOPS_VISIBLE_DEVICES="0,7")
    assert "TOPS_VISIBLE_DEVICES cannot be '0,7'" in bad.stderr


def test_autoload_does_nothing_unless_asked():
    code = "from gcu_compile.autoload import autoload; autoload(); import torch; print(hasattr(torch, 'gcu'))"
    assert run(code, GCU_COMPILE_EMULATE="").stdout == "False\n"
    assert run(code, GCU_COMPILE_EMULATE="gcu400").stdout == "True\n"


def test_a_process_emulates_one_card():
    code = "from gcu_compile.targets import emulator as e; e.start('gcu300'); e.start('gcu300'); e.start('gcu400')"
    assert "this process emulates gcu300 and cannot become gcu400" in run(code).stderr
    assert "unknown emulated card 'gcu30'. Did you mean 'gcu300'" in run(code.replace("gcu300", "gcu30")).stderr


def test_a_device_type_that_is_taken_is_said():
    code = (
        "import torch; torch.utils.rename_privateuse1_backend('other')\n"
        "from gcu_compile.targets import emulator; emulator.start('gcu300')"
    )
    assert "private device type is already 'other'" in run(code).stderr
