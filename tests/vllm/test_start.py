"""What makes a start short on target `host`: memory that comes when it is touched, a worker without its own process."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

pytestmark = pytest.mark.vllm
SIZE = 256 << 20


def test_cache_memory_is_zero_writable_and_resident_only_where_touched():
    from vllm_integration.lazy_memory import LazyZeros

    before = psutil.Process().memory_info().rss
    with LazyZeros():
        memory = torch.zeros(SIZE, dtype=torch.int8, device=torch.device("cpu"))
    assert psutil.Process().memory_info().rss - before < SIZE // 4
    assert memory.shape == (SIZE,) and memory.data_ptr() % 64 == 0
    view = memory.view(torch.float32).view(1024, -1)
    assert view[17].abs().max() == 0
    view[17] = 3.0
    assert view[17].sum() == 3 * view.shape[1] and view[16].abs().max() == 0
    assert memory[-1] == 0


def test_other_zeros_stay_torchs_own():
    from gcu_compile.kernels.host import pages
    from vllm_integration.lazy_memory import SMALLEST_BYTES, LazyZeros

    with LazyZeros():
        small = torch.zeros(8, dtype=torch.int8)
        other = torch.zeros(SMALLEST_BYTES // 4, dtype=torch.float32)
        out = torch.zeros((2, 3), dtype=torch.int8, out=torch.ones(2, 3, dtype=torch.int8))
        meta = torch.zeros(SMALLEST_BYTES, dtype=torch.int8, device="meta")
        shaped = torch.zeros((4, SMALLEST_BYTES), dtype=torch.int8)
    assert small.sum() == 0 and other.dtype == torch.float32 and out.abs().max() == 0 and meta.device.type == "meta"
    assert shaped.shape == (4, SMALLEST_BYTES)
    kept = pages.zeros((SMALLEST_BYTES,), torch.int8)[5:]  # a view keeps the mapping alive
    assert kept.fill_(1).sum(dtype=torch.int64) == SMALLEST_BYTES - 5


@pytest.mark.parametrize(("executor", "multiprocessing"), [("uni", "0"), ("mp", "1")])
def test_the_users_process_and_a_workers_own_are_not_bound(executor, multiprocessing, monkeypatch):
    from vllm_integration import cores

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *given: pytest.fail(f"bound: {given}"))
    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend=executor))
    assert cores.bind(config) == []


@pytest.mark.parametrize(("asked", "size", "kept"), [("uni", 1, "uni"), ("mp", 1, "mp"), ("uni", 2, "mp")])
def test_only_a_lone_worker_that_nobody_sent_away_stays(asked, size, kept):
    from vllm_integration import cores

    parallel = SimpleNamespace(distributed_executor_backend="mp", world_size=size)  # as vLLM's CPU platform leaves it
    cores.keep_in_process(asked, parallel)
    assert parallel.distributed_executor_backend == kept


def test_other_rules_of_ours_are_another_compiled_model(tmp_path, monkeypatch):
    """vLLM finds whole compiled models by the hash of its configuration alone."""
    from tiny import save_llama
    from vllm.engine.arg_utils import EngineArgs

    model = str(save_llama(tmp_path, eos_token_id=None, pad_token_id=None))

    def hashed(**given):
        settings = {"skip_tokenizer_init": True, "max_model_len": 128, **given}
        return EngineArgs(model=model, **settings).create_engine_config().compute_hash()

    plain, asked = hashed(), hashed(additional_config={"a": 1})
    assert plain == hashed() and plain != asked
    monkeypatch.setenv("GCU_COMPILE_DISABLE_RULES", "rms_norm")
    assert len({plain, asked, hashed(), hashed(additional_config={"a": 1})}) == 4


def test_an_additional_configuration_that_is_no_dict_keeps_its_meaning():
    from vllm_integration.compilation import keyed

    given = SimpleNamespace(compute_hash=lambda: "theirs", depth=3)
    one, other = keyed(given, "a"), keyed(given, "b")
    assert one.depth == 3 and one.compute_hash() != other.compute_hash()
    assert keyed(one, "b").compute_hash() == other.compute_hash()


def test_a_copy_of_an_additional_configuration_keeps_the_key():
    import copy

    from vllm_integration.compilation import keyed

    class Given:
        def compute_hash(self):
            return "theirs"

        def __deepcopy__(self, memo):
            return Given()

    one = keyed(Given(), "a")
    assert copy.deepcopy(one).compute_hash() == one.compute_hash() != Given().compute_hash()
