"""The loss in chunks is the loss of whole logits, with every kind of head."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")

from longnet_dist.errors import ShapeError
from longnet_dist.hf.parallel.head_loss import cross_entropy_sum, head_loss, replaced_forward

HEADS = {
    "plain": lambda: nn.Linear(6, 11, bias=False),
    "bias": lambda: nn.Linear(6, 11),
    "wrapped": lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 11)),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_loss_and_gradients_are_those_of_whole_logits(name, chunk):
    torch.manual_seed(0)
    head, states = HEADS[name]().double(), torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 7))
    labels[1, 2:] = -100
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    expected = F.cross_entropy(head(states).flatten(0, 1), labels.flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, [states, *head.parameters()])
    calls.clear()
    loss = head_loss(head, states, labels, chunk)
    assert calls
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [states, *head.parameters()]), wanted)
    torch.testing.assert_close(cross_entropy_sum(head(states), labels), expected)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, states, labels, chunk), expected)


def test_whole_logits_never_exist():
    head, states = nn.Linear(4, 1000, bias=False), torch.randn(64, 4, requires_grad=True)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(
                max((x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)), default=0)
            )
            return out

    for module in (head, nn.Sequential(head)):
        with Watch():
            head_loss(module, states, torch.zeros(64, dtype=torch.int64), chunk=4).backward()
        assert max(largest) <= 4 * 1000
        largest.clear()


def test_under_autocast_the_logits_are_rounded_and_the_loss_is_not():
    torch.manual_seed(0)
    head, states = nn.Linear(16, 50, bias=False), torch.randn(30, 16, requires_grad=True)
    labels = torch.arange(30)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(head, states, labels, 7)
    loss.backward()
    assert loss.dtype == states.grad.dtype == head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy_sum(head(states), labels), rtol=0.02, atol=0)


def test_a_replaced_forward_comes_back():
    head = nn.Linear(3, 4)
    with replaced_forward(head, lambda x: x):
        assert head(torch.ones(2, 3)).shape == (2, 3)
    assert "forward" not in head.__dict__
    head.forward = lambda x: x + 1
    with pytest.raises(RuntimeError), replaced_forward(head, lambda x: x):
        raise RuntimeError
    assert head(torch.zeros(1)) == 1


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"labels must be \(2, 5\)"):
        head_loss(nn.Linear(3, 4), torch.ones(2, 5, 3), torch.zeros(2, 6, dtype=torch.int64))
