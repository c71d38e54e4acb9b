"""Sequences grow at the start of a run: on any mesh alike, resumed in every bit, and cut where they should be."""

import os
import re
import signal

import pytest
import torch

from longnet_dist.checkpoint.format import newest_checkpoint
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.documents import Documents
from longnet_dist.model.longnet import LongNet
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.train.setup import RunSetup
from tests.distributed import run_distributed
from tests.train.runs import make_trainer, run, tiny_config

GROWING = ("train.length_warmup=4", "train.shortest_length=16", "train.steps=6")


def weights(config):
    return (newest_checkpoint(config.train.output_dir) / "model.safetensors").read_bytes()


def losses(metrics):
    return [step["loss"] for step in metrics]


def test_a_resumed_run_is_the_run_in_every_bit(tmp_path, corpus, capfd):
    whole = tiny_config(tmp_path / "whole", corpus, *GROWING)
    metrics = run(1, whole)
    assert "sequences grow: 16 tokens from step 1, 32 tokens from step 3, 64 from step 5" in capfd.readouterr().out
    first = tiny_config(tmp_path / "parts", corpus, *GROWING, "train.checkpoint_every=3")
    run_distributed(stop_after, 1, first, 3)
    capfd.readouterr()
    assert losses(run(1, first)) == losses(metrics)
    assert re.search(r"^going on from \S+step_0+3 after step 3 of \d+$", capfd.readouterr().out, re.MULTILINE)
    assert weights(first) == weights(whole)


def stop_after(config, steps):
    """Train, and be asked to stop within a length."""
    trainer = make_trainer(config)
    step = trainer._train_step

    def and_stop(number, *given):
        if number == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number, *given)

    trainer._train_step = and_stop
    assert not trainer.run()


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(2, ("parallel.sequence=2",)), (2, ("parallel.data=2",)), (1, ("train.chunk_length=24",))],
    ids=["sequence", "data", "chunks"],
)
@pytest.mark.parametrize("documents", ["false", "true"])
def test_it_is_the_same_on_any_mesh_and_in_chunks(tmp_path, corpus, ranks, settings, documents):
    given = (*GROWING, f"data.documents={documents}")
    alone = run(1, tiny_config(tmp_path / "alone", corpus, *given))
    other = run(ranks, tiny_config(tmp_path / "other", corpus, *given, *settings))
    assert losses(other) == pytest.approx(losses(alone), abs=2e-5)
    plain = run(1, tiny_config(tmp_path / "plain", corpus, "train.steps=1", f"data.documents={documents}"))
    assert losses(plain)[0] != losses(alone)[0]


def test_a_cut_sample_is_several_shorter_ones(tmp_path, corpus):
    """All labels stay, and the loss is that of the pieces as sequences of their own."""
    torch.manual_seed(0)
    model = LongNet(tiny_config(tmp_path / "run", corpus).model).double()
    tokens = torch.randint(256, (2, 64))
    labels = tokens.roll(-1, 1)
    cut = Documents.whole(64).cut(16, 64)
    stream = model.stream(64, cu_seqlens=cut)
    assert list(stream.record(64)) == []
    (shards,) = stream.replay(64)
    assert (shards.start, shards.stop) == (0, 64)
    found = model(tokens, labels, stream=stream).loss
    expected = model(tokens.view(8, 16), labels.view(8, 16)).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_rate_counts_the_flops_of_shorter_sequences(tmp_path, corpus):
    metrics = run(1, tiny_config(tmp_path / "run", corpus, *GROWING))
    flops = [step["tflops_per_gpu"] * step["step_seconds"] for step in metrics]
    assert flops[0] == pytest.approx(flops[1])
    assert flops[1] < flops[2] < flops[4] == pytest.approx(flops[5])
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == metrics


def test_a_warm_up_that_cannot_be_is_refused(tmp_path, corpus):
    with pytest.raises(ConfigError, match=r"which is more than half of data\.sequence_length=64"):
        tiny_config(tmp_path / "run", corpus, "train.length_warmup=4")
    config = tiny_config(tmp_path / "run", corpus, *GROWING, "model.attention=window", "model.window=8")
    with pytest.raises(ConfigError, match=r"but train\.length_warmup is 4"):
        RunSetup.make(config, 1, "cpu")
