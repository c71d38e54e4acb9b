"""Feed-forward networks in tiles compute what they compute whole, and keep less."""

import copy

import pytest
import torch

from longnet_dist.errors import ConfigError
from longnet_dist.hf.parallel.mlp_tiles import tile_mlps
from tests.hf.models import make, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own


@pytest.mark.parametrize("name", ["llama", "qwen3", "modernbert"])
def test_output_and_gradients_are_those_without_tiles(name):
    found = []
    for tile in (None, 7, 1, 64):
        model = make(name)
        if tile:
            assert tile_mlps(model, 3) == tile_mlps(model, tile) == 2
            assert type(model.base_model.layers[0].mlp).__name__.endswith("MLP")
            model = copy.deepcopy(model)
        logits = model(tokens(20)).logits
        logits.square().mean().backward()
        with torch.no_grad():
            assert torch.equal(model(tokens(20)).logits, logits)
        found.append((logits, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[1:], found[:1] * 3)


def test_no_activation_is_wider_than_a_tile():
    model = make("llama", intermediate_size=4096)
    tile_mlps(model, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(tokens(64, 1))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(x.numel() <= 64 * 128 for x in kept if x.data_ptr() not in weights)


@pytest.mark.parametrize(
    ("name", "tile", "message"),
    [
        ("llama", 0, "mlp_tile=0"),
        ("bert", 4, "no modules mlp"),
        ("gpt_oss", 4, "experts in them"),
    ],
)
def test_what_is_refused(name, tile, message):
    with pytest.raises(ConfigError, match=message):
        tile_mlps(make(name), tile)
