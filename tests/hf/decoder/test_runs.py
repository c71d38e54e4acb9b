"""``longnet train model.path=…`` trains a decoder of transformers, on any number of ranks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longnet_dist import DilatedPattern
from longnet_dist.checkpoint.format import newest_checkpoint
from longnet_dist.data.batches import Batches
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import CheckpointError
from longnet_dist.hf import dilate
from longnet_dist.optim.schedules import learning_rate
from longnet_dist.train.setup import RunSetup
from tests.hf.decoder.decoders import decoder_config, write_decoder
from tests.train.runs import import_deepspeed, run

TEXT = b"".join(b"line %d of a text that repeats itself, more or less\n" % number for number in range(400))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A token file of documents of 23 to 90 tokens."""
    import_deepspeed()
    path = tmp_path_factory.mktemp("data") / "text.tokens"
    with TokenFileWriter(path, ByteTokenizer(), validation=0.2) as writer:
        start = 0
        while start < len(TEXT):
            size = 23 + start % 68
            writer.add_document([TEXT[start : start + size]])
            start += size
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("source") / "qwen3")


def losses(ranks, config):
    return [step["loss"] for step in run(ranks, config)]


def plain_losses(config, source, data):
    """The losses of a loop of torch over the dilated model, with the same samples."""
    train = config.train
    model = dilate(AutoModelForCausalLM.from_pretrained(source), DilatedPattern((16, 32, 64), (1, 2, 4)))
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not model.get_input_embeddings().weight]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=train.adam_betas, eps=train.adam_eps)
    batches, found = Batches(TokenFile.open(data), "train", 64, train.batch_size, train.seed), []
    for step in range(train.steps):
        tokens, labels = batches.local(step)
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, train)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_one_and_two_ranks_train_as_a_loop_of_torch(tmp_path, source, data):
    config = decoder_config(source, tmp_path / "one", data)
    expected = plain_losses(config, source, data)
    assert expected[-1] < expected[0] - 0.2
    assert losses(1, config) == pytest.approx(expected, rel=1e-5)
    assert losses(2, decoder_config(source, tmp_path / "two", data)) == pytest.approx(expected, rel=1e-5)
    changed = ["train.chunk_length=32", "train.activation_checkpointing=full", "train.feed_forward_tile=8"]
    saving = decoder_config(source, tmp_path / "saving", data, *changed, "model.loss_chunk=5")
    assert losses(2, saving) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_stages_of_zero_and_micro_batches_change_nothing(tmp_path, source, data, stage):
    expected = losses(1, decoder_config(source, tmp_path / "one", data))
    settings = [f"deepspeed.zero_stage={stage}", "parallel.data=2", "train.micro_batch_size=1"]
    found = losses(2, decoder_config(source, tmp_path / "two", data, *settings))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_documents_are_trained_and_validated_apart(tmp_path, source, data, packing):
    settings = ["data.documents=true", "train.validate_every=4", "train.validation_tokens=300"]
    settings += [f"data.packing={packing}", "train.chunk_length=32"]
    one, two = (decoder_config(source, tmp_path / name, data, *settings) for name in ("one", "two"))
    expected = losses(1, one)
    assert losses(2, two) == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(losses(1, decoder_config(source, tmp_path / "joined", data))[0], rel=1e-4)
    found = [json.loads((tmp_path / name / "validation.jsonl").read_text())["loss"] for name in ("one", "two")]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_bf16_run_is_near(tmp_path, source, data):
    expected = losses(1, decoder_config(source, tmp_path / "wide", data))
    settings = ["train.precision=bf16", "train.activation_checkpointing=full"]
    assert losses(2, decoder_config(source, tmp_path / "bf16", data, *settings)) == pytest.approx(expected, rel=5e-3)


def test_a_resumed_run_is_the_same_in_every_bit(tmp_path, source, data):
    def weights(folder):
        return load_file(newest_checkpoint(folder) / "model.safetensors")

    whole = decoder_config(source, tmp_path / "whole", data, "train.checkpoint_every=2")
    expected = losses(2, whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000004")
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    found = losses(2, decoder_config(moved, tmp_path / "parts", data, "train.checkpoint_every=2"))
    assert found[-2:] == expected[-2:]
    first, again = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert first.keys() == again.keys() == load_file(source / "model.safetensors").keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_begins_with_the_weights_of_the_folder_and_knows_them(tmp_path, source, data):
    config = decoder_config(source, tmp_path / "run", data, "train.learning_rate=1e-30", "train.steps=1")
    run(1, config)
    trained, begun = (
        load_file(newest_checkpoint(tmp_path / "run") / "model.safetensors"),
        load_file(source / "model.safetensors"),
    )
    assert all(torch.equal(trained[name], begun[name]) for name in begun)
    other = write_decoder(tmp_path / "other", seed=4)
    with pytest.raises(CheckpointError, match=r"is of a run with another model\.weights"):
        RunSetup.make(decoder_config(other, tmp_path / "run", data), 1, "cpu")
    changed = shutil.copytree(source, tmp_path / "changed")
    fields = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"model\.config\.rms_norm_eps is 1e-06 there and 0\.001 here"):
        RunSetup.make(decoder_config(changed, tmp_path / "run", data), 1, "cpu")
    with pytest.raises(CheckpointError, match=r"model\.segment_lengths is"):
        RunSetup.make(decoder_config(source, tmp_path / "run", data, "model.segment_lengths=[16,32,48]"), 1, "cpu")


def test_config_json_alone_draws_the_weights_from_the_seed(tmp_path, source, data):
    settings = ["train.steps=1", "train.checkpoint_every=0"]
    names = [("a", 0), ("b", 0), ("c", 1)]
    found = [
        losses(1, decoder_config(source / "config.json", tmp_path / name, data, f"train.seed={seed}", *settings))[0]
        for name, seed in names
    ]
    assert found[0] == found[1] != found[2]
