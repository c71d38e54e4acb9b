"""A decoder of transformers computes in streams what it computes with ``hf.dilate``."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from longnet_dist import DilatedPattern
from longnet_dist.attention.decoding import Decoding
from longnet_dist.checkpoint.initial_weights import InitialWeights
from longnet_dist.checkpoint.run_model import new_model
from longnet_dist.errors import ShapeError
from longnet_dist.hf import CompactCache, dilate
from longnet_dist.inference.generation import Sampling, generate
from tests.hf.decoder.decoders import CONFIGS, decoder_config, write_decoder

ROWS = 100


def both(tmp_path, family):
    """The model of a run, and transformers' own with the same weights."""
    source = write_decoder(tmp_path / family, family)
    config = decoder_config(source, tmp_path / "run", tmp_path / "data").model
    ours = new_model(config)
    InitialWeights.of_model(config, begins=True).load(ours)
    theirs = dilate(AutoModelForCausalLM.from_pretrained(source), DilatedPattern((16, 32, 64), (1, 2, 4)))
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_the_dilated_model(tmp_path, family):
    ours, theirs = both(tmp_path, family)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    tokens = torch.randint(256, (2, ROWS))
    expected = theirs(tokens).logits
    assert torch.allclose(ours(tokens).logits, expected, atol=1e-5)
    labels = torch.randint(256, (2, ROWS)).masked_fill(torch.rand(2, ROWS) < 0.1, -100)
    output = ours(tokens, labels)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert output.num_labels == (labels != -100).sum()


def test_documents_count_their_positions_anew(tmp_path):
    ours, theirs = both(tmp_path, "qwen3")
    tokens, edges = torch.randint(256, (1, ROWS)), [0, 30, 37, ROWS]
    alone = [theirs(tokens[:, start:stop]).logits for start, stop in pairwise(edges)]
    assert torch.allclose(ours(tokens, cu_seqlens=edges).logits, torch.cat(alone, 1), atol=1e-5)


def test_a_stream_gives_the_same_in_chunks(tmp_path):
    ours, _ = both(tmp_path, "llama")
    tokens, stream = torch.randint(256, (2, ROWS)), ours.stream(ROWS)
    with torch.no_grad():
        parts = [ours(tokens[:, s.start : s.stop], stream=stream).logits for s in stream.forward(40)]
        assert len(parts) == 3
        assert torch.allclose(torch.cat(parts, 1), ours(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_continues_a_text_as_transformers_does(tmp_path, family):
    ours, theirs = both(tmp_path, family)
    prompt = torch.randint(1, 256, (1, 50))
    assert isinstance(ours.decoding(1, 100), Decoding)
    steps = list(generate(ours, [prompt[0].tolist()], 30, Sampling(temperature=0)))
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(prompt, cache=CompactCache(theirs.config), **settings)[0, 50:]
    assert [ids[0] for ids in steps] == expected.tolist()


def test_angles_of_rotations_stay_in_float32(tmp_path):
    ours, _ = both(tmp_path, "qwen3")
    before = ours.model.rotary_emb.inv_freq.clone()
    ours.to(torch.bfloat16)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert torch.equal(ours.model.rotary_emb.inv_freq, before)


def test_labels_must_fit(tmp_path):
    ours, _ = both(tmp_path, "qwen3")
    with pytest.raises(ShapeError, match=r"tokens and labels must both be \(batch, rows\)"):
        ours(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 7, dtype=torch.int64))
