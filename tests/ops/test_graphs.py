import gc
import threading
import weakref

import pytest
import torch

from longnet_dist.ops.graphs import DifferentiableGraph, Graph, _nothing_collected


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


def two_layers(device):
    torch.manual_seed(0)
    weights = [torch.randn(4, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3)]
    return weights, lambda x: ((x @ weights[0]).tanh() @ weights[1]).square().sum()  # the last is not used


def inputs_of(device, count=3):
    return [torch.randn(5, 4, dtype=torch.float64, device=device) for _ in range(count)]


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_gives_the_gradients_of_its_inputs_and_of_changed_weights(device):
    weights, function = two_layers(device)
    graph = DifferentiableGraph(function, inputs_of(device, 1), weights)
    found = []
    for number, x in enumerate(inputs_of(device)):
        expected = function(x)
        gradients = torch.autograd.grad(3 * expected, weights[:2])
        loss = graph(x)
        given = torch.autograd.grad(3 * loss, weights, allow_unused=True)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(given[:2], gradients)
        assert given[2] is None
        found.append((given[0], given[0].clone()))
        with torch.no_grad():
            weights[0].mul_(0.5 + number)
    for kept, copy in found:  # later calls overwrite nothing that was returned
        assert torch.equal(kept, copy)


@pytest.mark.parametrize("device", DEVICES)
def test_a_backward_after_the_next_call_is_refused(device):
    weights, function = two_layers(device)
    first, second = inputs_of(device, 2)
    graph = DifferentiableGraph(function, [first], weights)
    loss = graph(first)
    graph(second)
    with pytest.raises(RuntimeError, match="overwritten by a later call"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_thread_pins_memory_while_a_graph_is_captured():
    weights, function = two_layers("cuda")
    ended = threading.Event()

    def pin():
        while not ended.is_set():
            torch.empty(1 << 20).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for x in inputs_of("cuda", 3):
            DifferentiableGraph(function, [x], weights)(x).backward()
    finally:
        ended.set()
        thread.join()
    assert weights[0].grad is not None
