import math

import torch
from torch.nn import functional as F

from longnet_dist.config.block_style import BlockStyle
from longnet_dist.config.model import named_model
from longnet_dist.model.block import Block
from longnet_dist.model.feed_forward import FeedForward


def test_feed_forward_is_its_equation():
    torch.manual_seed(0)
    network, x = FeedForward(8, 20), torch.randn(2, 3, 8)
    inner = F.gelu(x @ network.fc1.weight.T + network.fc1.bias)
    inner = (inner - inner.mean(-1, keepdim=True)) / (inner.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(network(x), inner @ network.fc2.weight.T + network.fc2.bias)


def test_a_gated_feed_forward_is_its_equation():
    torch.manual_seed(0)
    network, x = FeedForward(8, 20, style=BlockStyle(gated=True, activation="silu", sub_norm=False)), torch.randn(3, 8)
    assert network.fc1.weight.shape == (40, 8)
    h = x @ network.fc1.weight.T + network.fc1.bias
    inner = h[:, :20] * torch.sigmoid(h[:, :20]) * h[:, 20:]
    torch.testing.assert_close(network(x), inner @ network.fc2.weight.T + network.fc2.bias)
    torch.manual_seed(0)
    normed = FeedForward(8, 20, style=BlockStyle(gated=True, activation="silu"))
    expected = F.layer_norm(inner, (20,)) @ network.fc2.weight.T + network.fc2.bias
    torch.testing.assert_close(normed(x), expected)


def test_gate_and_input_begin_like_linear_layers_of_their_own():
    torch.manual_seed(0)
    network = FeedForward(256, 512, style=BlockStyle(gated=True))
    for half in network.fc1.weight.chunk(2):
        assert abs(half.std().item() / math.sqrt(2 / (256 + 512)) - 1) < 0.02
    assert named_model("tiny", ffn="gated").style(0) == BlockStyle(gated=True, activation="silu")


def test_block_is_residual_sub_layers_with_norms_before_and_inside():
    torch.manual_seed(0)
    block, x = Block(named_model("tiny"), None, None), torch.randn(2, 30, 64)
    middle = x + block.self_attn(F.layer_norm(x, (64,)))
    expected = middle + block.ffn(F.layer_norm(middle, (64,)))
    torch.testing.assert_close(block(x, None, None), expected)
    assert isinstance(block.self_attn.inner_attn_ln, torch.nn.LayerNorm)


def test_initialisation_has_magnetos_gains():
    torch.manual_seed(0)
    config = named_model("tiny", layers=8, dim=256, kv_heads=2)
    block = Block(config, None, None)
    gain = math.sqrt(math.log(16))
    attention, ffn = block.self_attn, block.ffn
    for layer, factor in (
        (attention.q_proj, 1), (attention.k_proj, 1), (attention.v_proj, gain), (attention.out_proj, gain),
        (ffn.fc1, gain), (ffn.fc2, gain),
    ):  # fmt: skip
        wanted = factor * math.sqrt(2 / sum(layer.weight.shape))
        assert abs(layer.weight.std().item() / wanted - 1) < 0.02
        assert not layer.bias.any()
