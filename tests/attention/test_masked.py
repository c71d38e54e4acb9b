"""Masked attention equals a masked softmax in float64, and refuses what it cannot compute."""

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import flex_attention

from longnet_dist import LongNet, LongNetConfig, Positions, dilated_attention
from longnet_dist.attention.masked import FLEX_BLOCK, MaskedAttention, _block_mask, masked_attention
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.attention_kinds import ATTENTION_KINDS, AttentionSettings
from longnet_dist.geometry.masked_pattern import FixedPattern, WindowPattern
from tests.geometry.test_masked_pattern import fixed, windowed

CASES = [
    (FixedPattern(), 300, 6, 6, True),
    (FixedPattern(), 517, 8, 4, True),
    (WindowPattern(37), 300, 4, 2, True),
    (WindowPattern(300), 333, 2, 2, False),
]


def mask_of(pattern, N, heads, kv_heads, causal):
    """Return (H, N, N), from the words of the pattern."""
    each = [
        fixed(N, head) if isinstance(pattern, FixedPattern) else windowed(N, pattern.window, causal)
        for head in range(kv_heads)
    ]
    return torch.stack([torch.from_numpy(each[head // (heads // kv_heads)]) for head in range(heads)])


def masked_softmax(q, k, v, mask):
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[3] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(("pattern", "N", "heads", "kv_heads", "causal"), CASES)
def test_output_and_gradients_equal_a_masked_softmax(pattern, N, heads, kv_heads, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, N, h, 16, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    dout = torch.randn(2, N, heads, 16, dtype=torch.float64)
    out = masked_attention(q, k, v, pattern, causal)
    expected = masked_softmax(q, k, v, mask_of(pattern, N, heads, kv_heads, causal))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)
    )


@pytest.mark.filterwarnings("ignore")  # flex_attention warns that it is not compiled
@pytest.mark.parametrize(("pattern", "N", "heads", "kv_heads", "causal"), CASES)
def test_flex_attention_is_told_the_mask_and_its_blocks(pattern, N, heads, kv_heads, causal):
    mask = mask_of(pattern, N, heads, kv_heads, causal)
    blocks = _block_mask(pattern, N, kv_heads, heads, causal, torch.device("cpu"))
    number = -(-N // FLEX_BLOCK)
    padded = torch.zeros(heads, number * FLEX_BLOCK, number * FLEX_BLOCK, dtype=torch.bool)
    padded[:, :N, :N] = mask
    some = padded.view(heads, number, FLEX_BLOCK, number, FLEX_BLOCK).any(4).any(2)
    assert (blocks.to_dense()[0].bool() == some).all()
    q, k, v = (torch.randn(1, h, N, 16, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    out = flex_attention(q, k, v, block_mask=blocks, enable_gqa=heads != kv_heads).transpose(1, 2)
    torch.testing.assert_close(out, masked_softmax(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask))


def test_full_attention_is_one_branch_of_the_same_kernels():
    torch.manual_seed(0)
    settings = AttentionSettings((4,), (1,), "modulo", 1, True)
    q, k, v = (torch.randn(2, 90, 2, 8, dtype=torch.float64) for _ in range(3))
    every = torch.ones(90, 90, dtype=torch.bool)
    for causal, mask in ((True, every.tril()), (False, every)):
        out = dilated_attention(q, k, v, ATTENTION_KINDS["full"](settings), causal=causal)
        torch.testing.assert_close(out, masked_softmax(q, k, v, mask))


def model(**fields):
    settings = {"dim": 32, "layers": 3, "heads": 4, "segment_lengths": [32, 64], "dilation_rates": [1, 2]}
    torch.manual_seed(0)
    return LongNet(LongNetConfig(**settings | {"positions": "rope"} | fields)).double()


def test_the_kinds_of_a_model_share_weights_and_blocks():
    tokens = torch.randint(0, 256, (2, 200))
    models = [model(attention=kind) for kind in ("dilated", "full", "sparse")] + [model(attention="window", window=9)]
    states = [one.state_dict() for one in models]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    losses = [one(tokens, tokens).loss for one in models]
    assert len({round(loss.item(), 9) for loss in losses}) == 4
    assert [type(one.blocks[1].self_attn) is MaskedAttention for one in models] == [False, False, True, True]
    alone = [model(attention="window", window=1), model(attention="full", positions="none")]
    assert torch.equal(alone[0](tokens[:, :1]).logits, model(attention="sparse")(tokens[:, :1]).logits)


def test_full_layers_see_everything_whole_or_streamed():
    tokens = torch.randint(0, 256, (1, 300))
    for positions in ("rope", "xpos"):
        hybrid = model(full_layers=[1], positions=positions)
        whole = hybrid(tokens, tokens)
        stream, loss = hybrid.stream(300), 0
        for shards in stream.forward(64):
            start, stop = shards.window(0)
            loss = loss + hybrid(tokens[:, start:stop], tokens[:, start:stop], stream=stream).loss_sum
        torch.testing.assert_close(loss, whole.loss_sum)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 256
    for each, reaches in ((model(), False), (model(full_layers=[2]), True)):
        moved = (each(tokens).logits - each(changed).logits)[0, -1].abs().max() > 0
        assert moved == reaches


def test_what_is_not_a_whole_sequence_is_refused():
    sparse, tokens = model(attention="sparse"), torch.randint(0, 256, (1, 200))
    stream = sparse.stream(200)
    (shards,) = stream.chunks(200)
    stream.enter(shards)
    assert torch.equal(sparse(tokens, stream=stream).logits, sparse(tokens).logits)
    stream = sparse.stream(200)
    stream.enter(stream.chunks(100)[0])
    with pytest.raises(ConfigError, match=r"tokens 0 to 99 of a stream of 200; use attention=dilated"):
        sparse(tokens[:, :100], stream=stream)
    with pytest.raises(ConfigError, match="packed documents"):
        sparse(tokens, cu_seqlens=[0, 100, 200])
    stream = sparse.stream(200, [0, 100, 200])
    stream.enter(stream.chunks(200)[0])
    with pytest.raises(ConfigError, match="packed documents"):
        sparse(tokens, stream=stream)
    with pytest.raises(ShapeError, match="from token 5 on"):
        sparse(tokens, start=5)
    with pytest.raises(ConfigError, match="attention_backend=auto"):
        MaskedAttention(32, 4, FixedPattern(), backend="sdpa")


def test_ranks_are_refused_alike_before_they_meet(monkeypatch):
    layer = MaskedAttention(32, 4, WindowPattern(9), positions=Positions(), group=Mock(spec=dist.ProcessGroup))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 3)
    with pytest.raises(
        ConfigError, match=r"WindowPattern\(9\) computes whole sequences .* over 3 ranks; use attention"
    ):
        layer(torch.randn(1, 20, 32))
