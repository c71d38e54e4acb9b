"""A token file that changes under a run ends it with a message; what cannot work is said before the first step."""

import os

import pytest

from longnet_dist.cli import evaluate as evaluate_command
from longnet_dist.cli import train as train_command
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer, load_tokenizer
from longnet_dist.errors import DataError
from longnet_dist.train.setup import RunSetup
from tests.data.tiny_tokenizer import write_tiny_tokenizer
from tests.distributed import run_distributed
from tests.train.runs import import_deepspeed, make_trainer, tiny_config, write_config


def flip(path, position=-40):
    """Change a byte of a file, and its time of change for certain."""
    with path.open("r+b") as stream:
        stream.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def truncate(path):
    os.truncate(path, 4096 + 100)


def messages(configs, changes):
    """What runs say whose data is changed before their first step."""
    found = []
    for config, change in zip(configs, changes, strict=True):
        trainer = make_trainer(config)
        change(config.data.path)
        try:
            trainer.run()
        except DataError as error:
            found.append((str(error), trainer.step))
    return found


def test_a_run_notices_that_its_data_has_changed(tmp_path):
    import_deepspeed()
    configs = []
    for name, settings in (
        ("read", ()),
        ("validation", ("train.validate_every=1", "train.validation_tokens=64")),
        ("checkpoint", ("train.checkpoint_every=2",)),
    ):
        path = tmp_path / f"{name}.tokens"
        with TokenFileWriter(path, ByteTokenizer(), validation=0.2) as writer:
            writer.add_document([b"some text to train on, " * 400])
        configs.append(tiny_config(tmp_path / name, path, *settings))
    (found,) = run_distributed(messages, 1, configs, [truncate, flip, flip])
    (read, first), (validation, second), (checkpoint, third) = found
    assert "truncated" in read
    assert "overwritten" in validation
    assert "overwritten" in checkpoint
    assert (first, second, third) == (0, 1, 2)
    assert not list((tmp_path / "checkpoint" / "checkpoints").glob("step_*"))


def test_verify_compares_checksums_first(tmp_path):
    path = tmp_path / "a.tokens"
    with TokenFileWriter(path, ByteTokenizer()) as writer:
        writer.add_document([b"text " * 400])
    flip(path, 4096 + 300)
    config = write_config(tmp_path, "run", path)
    (tmp_path / "model").mkdir()  # evaluate asks first whether there is something to evaluate
    with pytest.raises(DataError, match=r"the tokens of .* are damaged"):
        train_command.main([str(config), "--verify", "--processes", "1"])
    with pytest.raises(DataError, match=r"the tokens of .* are damaged"):
        evaluate_command.main([str(tmp_path / "model"), "--data", str(path), "--context", "8", "--verify"])
    assert not (tmp_path / "run").exists()


def test_a_prompt_is_checked_before_the_first_step(tmp_path):
    tokenizer = load_tokenizer(str(write_tiny_tokenizer(tmp_path / "tokenizer.json")))
    path, vocab_size = tmp_path / "a.tokens", int(tokenizer.encode(b"tokenizers").max())
    with TokenFileWriter(path, tokenizer) as writer:
        writer.add_document([b"?!" * 400])
    assert TokenFile.open(path).header.max_id < vocab_size
    sample = "train.sample_tokens=5", "train.sample_prompt=tokenizers"

    def make(size, *settings):
        RunSetup.make(tiny_config(tmp_path / "run", path, f"model.vocab_size={size}", *settings), 1, "cpu")

    make(vocab_size + 1, *sample)
    make(vocab_size)
    with pytest.raises(DataError, match=rf"'tokenizers' has the token id {vocab_size} .* ends at {vocab_size - 1}"):
        make(vocab_size, *sample)
    assert not (tmp_path / "run").exists()
