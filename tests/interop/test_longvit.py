"""LongViT by its key layout: a convolution's patches, learned positions, blocks, no last norm."""

import pytest
import torch
from torch.nn import functional as F

from longnet_dist.errors import CheckpointError, ShapeError
from longnet_dist.interop import from_torchscale, longvit_encoder
from longnet_dist.interop.longvit import to_longvit
from tests.interop.test_torchscale import MODELS

CASE = MODELS["encoder_longvit"]


def weights(prefix="", side=4, patches=16):
    generator = torch.Generator().manual_seed(0)
    state = {
        "patch_embed.proj.weight": torch.randn(32, 3, side, side, generator=generator) / 4,
        "patch_embed.proj.bias": torch.randn(32, generator=generator),
        "pos_embed": torch.randn(1, patches, 32, generator=generator),
    } | {f"encoder.{key}": x for key, x in CASE["state_dict"].items()}
    return {prefix + key: x for key, x in state.items()}


@pytest.mark.parametrize("prefix", ["", "backbone.", "model."])
def test_rows_are_the_encoders_of_convolved_patches(prefix):
    state = weights(prefix)
    if prefix == "backbone.":  # a DINO teacher with its head
        model = longvit_encoder({"teacher": state | {"head.mlp.0.weight": torch.zeros(3, 3)}}, heads=4)
    elif prefix == "model.":  # a classifier
        norm = {"fc_norm.weight": torch.full((32,), 2.0), "fc_norm.bias": torch.ones(32)}
        model = longvit_encoder(state | norm | {"head.weight": torch.zeros(2, 32)}, heads=4)
    else:
        model = longvit_encoder(state, heads=4)
    images = torch.randn(2, 3, 16, 16)
    out = model(images)
    own = weights()
    rows = F.conv2d(images, own["patch_embed.proj.weight"], own["patch_embed.proj.bias"], stride=4).flatten(2)
    rows = rows.transpose(1, 2) + own["pos_embed"]
    settings = {"segment_length": "[64, 128, 256, 512, 1024]", "dilated_ratio": "[1, 2, 4, 8, 16]"}
    expected = from_torchscale(CASE["state_dict"], CASE["config"] | settings)(features=rows).last_hidden_state
    torch.testing.assert_close(out.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    pooled = expected.mean(1)
    pooled = F.layer_norm(pooled, (32,)) * 2 + 1 if prefix == "model." else pooled
    torch.testing.assert_close(out.pooled, pooled, atol=1e-5, rtol=1e-5)
    back = to_longvit(model.encoder)
    assert {key: x for key, x in back.items() if "fc_norm" not in key}.keys() == own.keys()
    assert all(torch.equal(back[key], x) for key, x in own.items())


def test_segments_follow_from_the_image():
    model = longvit_encoder(weights(side=32, patches=128 * 128), heads=4)
    assert model.encoder.config.segment_lengths == (1024, 2048, 4096, 8192, 16384)


def test_faults():
    with pytest.raises(ShapeError, match=r"must be \(batch, 3, 16, 16\)"):
        longvit_encoder(weights(), heads=4)(torch.randn(1, 3, 20, 16))
    with pytest.raises(CheckpointError, match="LongViT has pos_embed"):
        longvit_encoder(CASE["state_dict"])
    with pytest.raises(CheckpointError, match=r"encoder.layers.1.ffn.fc1.bias is missing"):
        longvit_encoder({key: x for key, x in weights().items() if "1.ffn.fc1.bias" not in key}, heads=4)
