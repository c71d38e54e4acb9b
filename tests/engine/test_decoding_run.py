import pytest
import torch
from torch import nn

from longnet_dist.engine.decoding_run import run_decoding
from longnet_dist.inference.decoder import Decoder
from tests.inference.test_generation import unaligned_model

FIELDS = [{}, {"kv_heads": 2, "qk_norm": True}, {"ffn": "gated", "sinks": True}, {"positions": "none"}]


def steps(model, runner, count=20):
    """Logits of the first steps of two texts, whose blocks ``runner`` runs."""
    decoder, found = Decoder(model, 2, 200), []
    for layer in decoder._cache.layers:
        layer.runner = runner
    decoder.load([1, 2, 3], [0])
    decoder.load(list(range(90)), [1])
    for _ in range(count):
        logits = decoder.step()
        found.append(logits.clone())
        decoder.follow(logits.argmax(-1))
    return torch.stack(found)


def counted(calls):
    def run(*given):
        calls.append(given)
        return run_decoding(*given)

    return run


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_it_computes_what_the_modules_compute(fields):
    model, calls = unaligned_model(**fields), []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    torch.testing.assert_close(steps(model, counted(calls)), steps(model, None), rtol=0, atol=1e-9)
    assert len(calls) == 40


def test_a_block_with_hooks_runs_as_plain_modules():
    model, seen = unaligned_model(), []
    model.blocks[0].ffn.fc1.register_forward_hook(lambda *_: seen.append(1))
    steps(model, run_decoding, 3)
    assert len(seen) > 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_its_kernels_compute_what_the_modules_compute(fields):
    model = unaligned_model(**fields).float().cuda()
    torch.testing.assert_close(steps(model, run_decoding), steps(model, None), rtol=1e-4, atol=1e-4)
