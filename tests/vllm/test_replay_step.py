"""When a step is replayed, and when it is not: a model of one layer, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from gcu_compile.errors import InvalidInputError
from gcu_compile.kernels import registry
from gcu_compile.kernels.linear import pack

pytestmark = pytest.mark.vllm
HEADS, SIZE, SLOTS, BLOCKS = 2, 32, 16, 6
WIDTH = HEADS * SIZE
LENGTHS = (20, 5)  # of two sequences, the new tokens among them
TABLE = torch.tensor([[3, 1], [5, 0]], dtype=torch.int32)


class Model(nn.Module):
    """A product, attention, and a product, as vLLM calls them: two compiled pieces around an operation in Python."""

    def __init__(self):
        super().__init__()
        from vllm_integration.attention import GcuAttentionImpl

        torch.manual_seed(0)
        self.before, self.after = (
            nn.Parameter(pack(torch.randn(n, WIDTH).bfloat16()), False) for n in (3 * WIDTH, WIDTH)
        )
        self.scale = nn.Parameter(torch.rand(WIDTH).bfloat16(), False)
        impl = GcuAttentionImpl(HEADS, SIZE, SIZE**-0.5, HEADS, None, None, "auto")
        cache = torch.zeros(BLOCKS, HEADS, SLOTS, 2 * SIZE, dtype=torch.bfloat16)
        self.layer = SimpleNamespace(head_size=SIZE, head_size_v=SIZE, kv_cache=cache, impl=impl)
        self.first = torch.compile(self._first, backend="gcu", dynamic=False)
        self.last = torch.compile(self._last, backend="gcu", dynamic=False)
        self.others = torch.compile(lambda x: silu(x) * 3, backend="gcu", dynamic=False)

    @staticmethod
    def _first(x, weight, scale):
        q, k, v = torch.ops.gcu.linear(silu(x) * scale, weight, 3 * WIDTH).split(WIDTH, -1)
        return q.contiguous(), k.contiguous(), v.contiguous()

    @staticmethod
    def _last(x, weight):
        return silu(torch.ops.gcu.linear(x, weight, WIDTH))

    def forward(self, x):
        from vllm.forward_context import get_forward_context

        q, k, v = (y.view(-1, HEADS, SIZE) for y in self.first(x, self.before, self.scale))
        out = torch.empty(q.shape, dtype=q.dtype)
        metadata = get_forward_context().attn_metadata["layer"]
        self.layer.impl.forward(self.layer, q, k, v, self.layer.kv_cache, metadata, out)
        return self.last(out.view(-1, WIDTH), self.after)


class Runner:
    """What `StepReplay` needs of vLLM's model runner; counts the steps that go the usual way."""

    def __init__(self):
        from vllm_integration.replay import StepReplay

        self.model, self.usual, self.twist = Model(), 0, lambda y: y
        self.idle = False  # whether there is another group of layers, which calls nothing
        self.replay = StepReplay(self)

    def get_model(self):
        return self.model

    def _model_forward(self, input_ids, positions, intermediate_tensors, inputs_embeds, **more):
        self.usual += 1
        return self.twist(self.model(inputs_embeds))

    def step(self, lengths=LENGTHS, table=TABLE, rows=None, **more):
        """One new token of each sequence; whether it was replayed, and its result and that of the usual way."""
        from vllm.forward_context import ForwardContext, override_forward_context

        from vllm_integration.attention import Metadata

        count = len(lengths) if rows is None else rows
        starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
        slots = [int(table[i, (n - 1) // SLOTS]) * SLOTS + (n - 1) % SLOTS for i, n in enumerate(lengths)]
        slots += [-1] * (count - len(slots))
        metadata = Metadata(starts, torch.tensor(lengths, dtype=torch.int32), table, torch.tensor(slots), True)
        layers, tables = {"layer": self.model.layer}, {"layer": metadata}
        if self.idle:
            others = (x.clone() for x in (starts, metadata.seq_lens, table))
            tables["other"] = Metadata(*others, torch.empty(0, dtype=torch.int64), False)
            layers["other"] = self.model.layer
        context = ForwardContext(no_compile_layers=layers, attn_metadata=tables, slot_mapping={})
        x = torch.randn(count, WIDTH).bfloat16()
        with torch.inference_mode(), override_forward_context(context):
            usual = self.usual
            got = self.replay(inputs_embeds=x, **more)
            return self.usual == usual, got, self.twist(self.model(x))

    def until_replayed(self, **given):
        """Steps until one of this form is replayed; each gives what the usual way gives."""
        for _ in range(5):
            replayed, got, expected = self.step(**given)
            assert torch.equal(got, expected)
            if replayed:
                return
        raise AssertionError("no step was replayed")


@pytest.fixture
def runner():
    torch._dynamo.reset()
    return Runner()


def test_the_fifth_step_of_a_form_is_replayed(runner):
    ways = [runner.step()[0] for _ in range(6)]
    assert ways == [False, False, False, False, True, True]


def test_other_lengths_and_tables_are_no_other_form(runner):
    runner.until_replayed()
    for lengths, table in (((1, 9), TABLE), ((32, 32), TABLE.flip(0)), ((7, 8), TABLE[:, :1].contiguous())):
        replayed, got, expected = runner.step(lengths=lengths, table=table)
        assert replayed and torch.equal(got, expected)


def test_another_number_of_tokens_is_another_form(runner):
    runner.until_replayed()
    assert not runner.step(lengths=(20,), table=TABLE[:1])[0]
    runner.until_replayed(lengths=(20,), table=TABLE[:1])
    assert runner.step()[0]


def test_the_result_is_the_callers(runner):
    """vLLM keeps hidden states of some steps."""
    runner.until_replayed()
    _, first, expected = runner.step()
    runner.step()
    assert torch.equal(first, expected)


@pytest.mark.parametrize("name", ["before", "scale"])
def test_a_weight_that_was_replaced_is_noticed_when_a_request_begins(runner, name):
    runner.until_replayed()
    old = getattr(runner.model, name)
    setattr(runner.model, name, nn.Parameter(old * 2, False))
    runner.replay.check_again()
    replayed, got, expected = runner.step()
    assert not replayed and torch.equal(got, expected)
    runner.until_replayed()


def test_a_weight_that_moved_is_noticed_when_a_request_begins(runner):
    runner.until_replayed()
    runner.model.after.data = runner.model.after.data * 2
    runner.replay.check_again()
    assert not runner.step()[0]
    runner.until_replayed()


def test_a_weight_that_was_written_to_is_read(runner):
    runner.until_replayed()
    runner.model.after.mul_(2)
    replayed, got, expected = runner.step()
    assert replayed and torch.equal(got, expected)


def test_another_cache_is_noticed_when_a_request_begins(runner):
    runner.until_replayed()
    runner.model.layer.kv_cache = torch.zeros_like(runner.model.layer.kv_cache)
    runner.replay.check_again()
    assert not runner.step()[0]
    runner.until_replayed()


def test_a_weight_that_shares_its_memory_with_another_is_noticed(runner):
    both = torch.cat([runner.model.after.flatten(), runner.model.after.flatten()])
    size, shape = both.numel() // 2, runner.model.after.shape
    runner.model.unused = nn.Parameter(both[:size].view(shape), False)
    runner.model.after = nn.Parameter(both[size:].view(shape), False)
    runner.until_replayed()
    runner.model.after = nn.Parameter(runner.model.after * 2, False)
    runner.replay.check_again()
    assert not runner.step()[0]
    runner.until_replayed()


def test_the_first_request_after_is_compared_once_more(runner):
    runner.until_replayed()
    runner.replay.check_again()
    assert [runner.step()[0] for _ in range(3)] == [False, True, True]
    runner.replay.check_again()
    assert runner.step()[0]


def test_a_module_that_someone_hooked_is_refused(runner, caplog, monkeypatch):
    from vllm_integration import replay

    caplog.set_level("INFO", logger=replay.log.name)
    monkeypatch.setattr(replay.log, "propagate", True)
    seen = []
    runner.model.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    assert not any(runner.step()[0] for _ in range(12))
    assert len(seen) == 24  # each step, and the model alone
    assert "a hook of one of its modules" in caplog.text


def test_a_hook_that_comes_later_is_noticed_when_a_request_begins(runner):
    runner.until_replayed()
    runner.replay.check_again()
    assert not runner.step()[0] and runner.step()[0]  # the second comparison
    seen = []
    handle = runner.model.register_forward_hook(lambda module, args, output: seen.append(1))
    runner.replay.check_again()
    assert not runner.step()[0] and seen
    handle.remove()
    runner.until_replayed()


def test_a_tensor_that_is_a_plain_attribute_is_checked_too(runner):
    runner.model.other = pack(torch.randn(WIDTH, WIDTH).bfloat16())
    last = runner.model.last
    runner.twist = lambda y: last(y, runner.model.other)
    runner.until_replayed()
    runner.model.other = pack(torch.randn(WIDTH, WIDTH).bfloat16())
    runner.replay.check_again()
    assert not runner.step()[0]
    runner.until_replayed()


def test_a_group_of_layers_that_writes_nothing(runner):
    """Such as cross attention: the last of a step's parameters stands in no kernel's arguments."""
    runner.idle = True
    runner.until_replayed()


def test_what_goes_wrong_beside_a_step_does_not_end_it(runner, caplog, monkeypatch):
    from vllm_integration import replay

    caplog.set_level("INFO", logger=replay.log.name)
    monkeypatch.setattr(replay.log, "propagate", True)
    runner.model.sparse = torch.eye(3).to_sparse()
    for _ in range(12):
        replayed, got, expected = runner.step()
        assert not replayed and torch.equal(got, expected)
    assert "Steps of few tokens are not replayed:" in caplog.text


def test_that_replay_was_wrong_is_not_forgotten(runner):
    turns = iter(range(1000))
    runner.twist = lambda y: runner.model.others(y) if next(turns) % 4 < 2 else y
    for _ in range(6):
        runner.step()
    runner.twist = lambda y: y
    runner.replay.forget()
    assert not any(runner.step()[0] for _ in range(8))


def test_a_model_that_changes_a_buffer_is_refused(runner, caplog, monkeypatch):
    from vllm_integration import replay

    caplog.set_level("INFO", logger=replay.log.name)
    monkeypatch.setattr(replay.log, "propagate", True)
    runner.model.register_buffer("count", torch.zeros(WIDTH))
    add = torch.compile(lambda y, count: (count.add_(1), y * 2)[1], backend="gcu", dynamic=False)
    runner.twist = lambda y: add(y, runner.model.count)
    assert not any(runner.step()[0] for _ in range(12))
    assert "the model changes one of its buffers" in caplog.text


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, True),
        ({"kv_transfer_config": object()}, False),
        ({"parallel_config": SimpleNamespace(world_size_across_dp=2)}, False),
    ],
)
def test_connectors_and_other_ranks_run_normally(changes, possible):
    from vllm_integration.replay import can_replay

    given = {"parallel_config": SimpleNamespace(world_size_across_dp=1), "kv_transfer_config": None} | changes
    assert can_replay(SimpleNamespace(**given)) is possible


def test_whoever_gets_at_the_worker_s_runner_between_steps_makes_it_forget():
    from vllm_integration.worker import GcuHostWorker

    forgotten = []
    worker = GcuHostWorker.__new__(GcuHostWorker)
    worker.model_runner = runner = SimpleNamespace()
    assert worker.model_runner is runner and not forgotten
    worker._replay = SimpleNamespace(forget=lambda: forgotten.append(1), check_again=lambda: forgotten.append(2))
    assert worker._step(lambda worker: worker.model_runner) is runner and not forgotten
    assert worker.model_runner is runner and forgotten == [1]


def test_whoever_gets_at_the_model_makes_everything_be_noted_anew(runner):
    runner.until_replayed()
    runner.replay.forget()
    assert [runner.step()[0] for _ in range(5)] == [False] * 4 + [True]


def test_a_step_that_is_not_what_its_kernels_say_is_found_out(runner, caplog, monkeypatch):
    """Something that no rule here foresees: other kernels at every step. The step's own result is the answer."""
    from vllm_integration import replay

    caplog.set_level("INFO", logger=replay.log.name)
    monkeypatch.setattr(replay.log, "propagate", True)
    turns = iter(range(1000))
    runner.twist = lambda y: runner.model.others(y) if next(turns) % 4 < 2 else y
    for _ in range(30):
        replayed, got, expected = runner.step()
        assert not replayed and torch.equal(got, expected)
    assert "gave other numbers than the step" in caplog.text
    assert "Steps of few tokens are not replayed: their kernels, called again, gave other numbers." in caplog.text


def test_a_refusal_is_told_once(runner, caplog, monkeypatch):
    from vllm_integration import replay

    caplog.set_level("INFO", logger=replay.log.name)
    monkeypatch.setattr(replay.log, "propagate", True)
    runner.twist = lambda y: y + 1
    for _ in range(15):
        assert not runner.step()[0]
    assert caplog.text.count("are not replayed: it runs aten::add") == 1


def test_tables_out_of_range_are_the_usual_error(runner):
    runner.until_replayed()
    with pytest.raises(InvalidInputError, match="slot_mapping"):
        runner.step(table=torch.full_like(TABLE, BLOCKS))
    assert runner.step()[0]


def test_who_watches_sees_the_step(runner, monkeypatch):
    runner.until_replayed()
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        assert not runner.step()[0]
    assert profile.function_events
    with monkeypatch.context() as patch:
        patch.setattr(registry, "watcher", lambda op, name, run, site, args, kwargs: run(*args, **kwargs))
        assert not runner.step()[0]
    with monkeypatch.context() as patch:
        patch.setenv("GCU_COMPILE_DEBUG_CHECKS", "1")
        assert not runner.step()[0]
    assert runner.step()[0]


def test_many_tokens_go_the_usual_way(runner, monkeypatch):
    from vllm_integration import replay

    monkeypatch.setattr(replay, "MOST_TOKENS", 1)
    assert not any(runner.step()[0] for _ in range(8))


def test_what_is_used_last_is_kept(runner, monkeypatch):
    from vllm_integration import replay

    monkeypatch.setattr(replay, "MOST_GRAPHS", 1)
    runner.until_replayed()
    runner.until_replayed(lengths=(20,), table=TABLE[:1])
    assert not runner.step()[0]
    runner.until_replayed()
