import gc
import weakref

import pytest
import torch

from longnet_dist.ops.graphs import Graph, _nothing_collected


def test_every_call_writes_the_result_into_the_same_tensor():
    state = torch.zeros(3)
    graph = Graph(lambda: state.add_(1) * 2, lambda: state * 2, torch.device("cpu"))
    first = graph()
    assert first.tolist() == [2, 2, 2]
    assert graph() is first
    assert (first.tolist(), state.tolist()) == ([4, 4, 4], [2, 2, 2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replay_sees_what_changed_in_place_and_the_warm_up_changes_nothing():
    state, ids = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    calls = []

    def step():
        calls.append(1)
        return state.add_(ids) * 2

    graph = Graph(step, lambda: ids * 2, torch.device("cuda"))
    results = []
    for value in (1, 5, 2):
        ids.fill_(value)
        results.append(graph().tolist()[0])
    assert results == [2, 12, 16]
    assert len(calls) == 1


class Cycle:
    """An object that only the garbage collector frees."""

    def __init__(self):
        self.cycle = self


def test_nothing_is_collected_while_a_graph_is_captured():
    gone = weakref.ref(Cycle())
    with _nothing_collected():
        assert gone() is None
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_in_a_cycle_of_references_does_not_break_the_capture_of_the_next():
    state = torch.zeros(3, device="cuda")

    def step():
        gc.collect()
        return state.add_(1) * 2

    for _ in range(2):
        cycle = Cycle()
        cycle.graph = Graph(step, lambda: state * 2, torch.device("cuda"))
        cycle.graph()
    assert state.tolist() == [2, 2, 2]
