import pytest
import torch

from longnet_dist.engine.norm_folding import fold_norms, unfold_gradients
from longnet_dist.engine.row_functions import after_attention, before_attention
from longnet_dist.model.longnet import LongNet
from tests.engine.test_block_run import model_config

EPS = 1e-5


@pytest.fixture
def weights():
    torch.manual_seed(0)
    block = LongNet(model_config()).double().blocks[0]
    with torch.no_grad():
        for vector in (parameter for parameter in block.parameters() if parameter.dim() == 1):
            vector += torch.randn_like(vector) / 4
    return dict(block.named_parameters())


def test_folded_weights_compute_the_same(weights):
    folded = fold_norms(weights)
    assert not any("norm." in name or "_ln." in name for name in folded)
    x, out = torch.randn(9, 16, dtype=torch.float64), torch.randn(9, 4, 4, dtype=torch.float64)
    expected = before_attention(x, None, weights, 4, EPS)
    torch.testing.assert_close(before_attention(x, None, folded, 4, EPS), expected, rtol=1e-9, atol=1e-11)
    # The last norm of these functions takes its weights by name.
    rest = {f"ffn.ffn_layernorm.{kind}": weights[f"ffn.ffn_layernorm.{kind}"] for kind in ("weight", "bias")}
    fc2 = {f"ffn.fc2.{kind}": weights[f"ffn.fc2.{kind}"] for kind in ("weight", "bias")}
    expected = after_attention(x, out, weights, EPS)
    torch.testing.assert_close(after_attention(x, out, folded | rest | fc2, EPS), expected, rtol=1e-9, atol=1e-11)


def test_unfolded_gradients_are_those_of_the_chain_rule(weights):
    folded = fold_norms(weights)
    given = {name: torch.randn_like(weight) for name, weight in folded.items()}
    names = list(weights)
    expected = torch.autograd.grad(list(folded.values()), list(weights.values()), list(given.values()))
    with torch.no_grad():
        actual = unfold_gradients(given, weights)
    assert sorted(actual) == sorted(names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
