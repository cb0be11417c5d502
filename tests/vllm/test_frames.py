"""Frames of Python calls: where a chunk of them ends, each call maps memory, unless a step was given room."""

import resource

import pytest

pytestmark = pytest.mark.vllm
CALLS, DEPTHS = 300, 300


def leaf():
    return None


def many_calls():
    for _ in range(CALLS):
        leaf()


def at(depth, work):
    return work() if depth == 0 else at(depth - 1, work)


def most_faults(work):
    """Of page faults, over the depths at which `work` is called; a fault is at least one per mapping."""
    found = []
    for depth in range(DEPTHS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        at(depth, work)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return max(found)


def test_a_step_with_room_maps_nothing_for_its_calls():
    from vllm_integration.frames import with_room

    assert most_faults(many_calls) >= CALLS, "this Python maps no chunk per call: frames.py can go"
    assert most_faults(with_room(many_calls)) < CALLS / 4


def test_room_is_for_calls_within_calls_too():
    from vllm_integration.frames import with_room

    def deep():
        for depth in range(0, 150, 5):
            at(depth, many_calls)

    assert most_faults(with_room(deep)) < CALLS / 4


def test_a_function_with_room_is_the_same():
    from vllm_integration.frames import with_room

    class Worker:
        @with_room
        def step(self, *given, **named):
            """Docs."""
            return self, given, named

    worker = Worker()
    assert worker.step(1, a=2) == (worker, (1,), {"a": 2})
    assert (Worker.step.__name__, Worker.step.__doc__) == ("step", "Docs.")


def test_steps_of_both_workers_have_room():
    from vllm_integration import frames, gcu_worker, worker

    for kind in (worker.GcuHostWorker, gcu_worker.GcuWorker):
        for step in (kind.execute_model, kind.sample_tokens):
            assert step.__code__.co_stacksize == frames.SLOTS, (kind, step)
