"""Documents of a call must be those of its stream, and joined items leave no argument out."""

import pytest
import torch

from longnet_dist import DilatedAttention, DilatedPattern, LongNet, LongNetConfig
from longnet_dist.errors import ShapeError

EDGES = [0, 4, 8]


def layer_and_model():
    layer = DilatedAttention(8, 2, DilatedPattern([4, 8], [1, 2]))
    config = LongNetConfig(
        vocab_size=5, dim=8, layers=1, heads=2, segment_lengths=[4, 8], dilation_rates=[1, 2], positions="rope"
    )
    return layer, LongNet(config)


@pytest.mark.parametrize("edges", [[0, 8], [0, 3, 8], [EDGES, [0, 8]]], ids=str)
@pytest.mark.parametrize("own", [None, EDGES], ids=str)
def test_documents_of_a_stream_are_its_own(own, edges):
    _, model = layer_and_model()
    stream = model.stream(8, cu_seqlens=own)
    stream.enter(stream.chunks(5)[0])
    with pytest.raises(ShapeError, match="leave cu_seqlens out, or give Stream the same"):
        model(torch.zeros(2, 5, dtype=torch.int64), stream=stream, cu_seqlens=edges)
    with pytest.raises(ShapeError, match="leave cu_seqlens out, or give Stream the same"):
        model.blocks[0].self_attn(torch.zeros(2, 5, 8), cache=stream.layers[0], cu_seqlens=edges)


def test_the_same_documents_may_be_given_to_every_chunk():
    torch.manual_seed(0)
    _, model = layer_and_model()
    tokens = torch.randint(5, (2, 8))
    whole, stream = model(tokens, cu_seqlens=EDGES).logits, model.stream(8, cu_seqlens=EDGES)
    parts = [model(tokens[:, slice(*x.window(0))], stream=stream, cu_seqlens=EDGES).logits for x in stream.forward(5)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("wrong", [{"start": 1}, {"total_rows": 9}], ids=str)
def test_items_with_documents_of_their_own_check_their_rows(wrong):
    layer, model = layer_and_model()
    with pytest.raises(ShapeError, match=r"start is 1|total_rows is"):
        layer(torch.zeros(2, 8, 8), cu_seqlens=[EDGES, [0, 8]], **wrong)
    with pytest.raises(ShapeError, match=r"start is 1|total_rows is"):
        model(torch.zeros(2, 8, dtype=torch.int64), cu_seqlens=[EDGES, [0, 8]], **wrong)
