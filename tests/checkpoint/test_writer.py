import errno
import os
import threading
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from longnet_dist.checkpoint import writer as checkpoint_writer
from longnet_dist.checkpoint.format import Progress, checkpoint_folder, checkpoints, read_state, tensor_files
from longnet_dist.checkpoint.writer import (
    CheckpointWriter,
    delete_old,
    remove_partial,
    take_snapshot,
    write_checkpoint,
)
from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import CheckpointError, LongNetError
from tests.distributed import run_distributed
from tests.train.runs import make_trainer, tiny_config

MODEL = LongNetConfig(name="tiny")
SNAPSHOT = {name: {"weight": torch.arange(3.0)} for name in tensor_files()}


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(0, 0, [2, 9, 10, 20, 21]), (1, 0, [21]), (2, 0, [20, 21]), (9, 0, [2, 9, 10, 20, 21]), (1, 10, [10, 20, 21])],
)
def test_old_checkpoints_are_deleted(tmp_path, keep_last, keep_every, left):
    for step in (2, 9, 10, 20, 21):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    delete_old(tmp_path, keep_last, keep_every)
    assert sorted((tmp_path / "checkpoints").iterdir()) == [checkpoint_folder(tmp_path, step) for step in left]


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """Every write, flush and rename in order: nothing that is renamed has not been flushed before."""
    events = []
    fsync, rename, save = os.fsync, type(tmp_path).rename, checkpoint_writer.save_file
    name_of = lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(f"flush {name_of(fd)}"), fsync(fd)))
    monkeypatch.setattr(type(tmp_path), "rename", lambda a, b: (events.append(f"rename {a.name}"), rename(a, b))[1])
    monkeypatch.setattr(checkpoint_writer, "save_file", lambda t, f: (events.append(f"write {f.name}"), save(t, f)))
    folder = checkpoint_folder(tmp_path, 7)
    write_checkpoint(folder, SNAPSHOT, MODEL, Progress(step=7, tokens=70, skipped=1))
    partial = ".step_00000007.partial"
    files = [event for name in tensor_files() for event in (f"write {name}", f"flush {name}")]
    assert events == [*files, "flush state.json", f"flush {partial}", f"rename {partial}", "flush checkpoints"]
    state = read_state(folder, MODEL)
    assert (state.step, state.tokens, state.skipped) == (7, 70, 1)
    assert load_file(folder / "model.safetensors")["weight"].tolist() == [0, 1, 2]


def test_what_a_crash_left_is_removed(tmp_path):
    write_checkpoint(checkpoint_folder(tmp_path, 1), SNAPSHOT, MODEL, Progress(step=1, tokens=10))
    left = tmp_path / "checkpoints" / ".step_00000002.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    remove_partial(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def snapshot_before_any_step(config):
    snapshot = take_snapshot(make_trainer(config).engine, has_optimizer_states=False)
    return {name: set(tensors) for name, tensors in snapshot.items()}, snapshot


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_snapshot_without_optimizer_states_has_zeros(tmp_path, corpus, stage):
    config = tiny_config(tmp_path / "run", corpus, f"deepspeed.zero_stage={stage}")
    (names, snapshot), (others, _) = run_distributed(snapshot_before_any_step, 2, config)
    assert all(part == set() for part in others.values())
    assert names["exp_avg.safetensors"] == names["model.safetensors"] != set()
    for name, tensor in snapshot["exp_avg_sq.safetensors"].items():
        assert tensor.shape == snapshot["model.safetensors"][name].shape
        assert not tensor.any()


def save_while_training(config):
    """A checkpoint that is written, slowly, while the next steps change the weights."""
    trainer = make_trainer(config)
    for step in range(2):
        trainer._train_step(step, 1e-2)
    expected = take_snapshot(trainer.engine)
    go_on, write = threading.Event(), checkpoint_writer.write_checkpoint
    checkpoint_writer.write_checkpoint = lambda *given: (go_on.wait(30), write(*given))
    with CheckpointWriter(config.train.output_dir, config.train, config.model) as writer:
        writer.save(trainer.engine, Progress(step=2, tokens=512))
        trainer._train_step(2, 1e-2)
        writer.check()
        assert checkpoints(config.train.output_dir) == []
        go_on.set()
        writer.save(trainer.engine, Progress(step=3, tokens=768))
        if dist.get_rank() == 0:
            assert checkpoint_folder(config.train.output_dir, 2).exists(), "the next one waits for the one before"
    return expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, corpus, stage):
    config = tiny_config(tmp_path / "run", corpus, f"deepspeed.zero_stage={stage}")
    expected, _ = run_distributed(save_while_training, 2, config)
    assert [folder.name[-1] for folder in checkpoints(config.train.output_dir)] == ["2", "3"]
    for name, tensors in expected.items():
        saved = load_file(checkpoint_folder(config.train.output_dir, 2) / name)
        assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
        later = load_file(checkpoint_folder(config.train.output_dir, 3) / name)
        assert not any(torch.equal(saved[key], later[key]) for key in tensors)


def write_on_full_disk(config):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    trainer = make_trainer(config)
    trainer._train_step(0, 1e-2)
    checkpoint_writer.save_file = full
    try:
        with CheckpointWriter(config.train.output_dir, config.train, config.model) as writer:
            writer.save(trainer.engine, Progress(step=1, tokens=256), last=True)
            writer.finish()
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, corpus, asynchronous):
    config = tiny_config(tmp_path / "run", corpus, f"train.checkpoint_async={str(asynchronous).lower()}")
    (message,) = run_distributed(write_on_full_disk, 1, config)
    assert "cannot write the checkpoint" in message
    assert "No space left on device" in message
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


class Disk:
    """Saves like ``save_file``, or fails as long as it is full."""

    def __init__(self):
        self.full, self.tries = True, 0

    def save(self, tensors, file):
        self.tries += file.name == "model.safetensors"
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        save_file(tensors, file)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(checkpoint_writer, "save_file", disk.save)
    monkeypatch.setattr(checkpoint_writer, "take_snapshot", lambda *_, **__: SNAPSHOT)
    monkeypatch.setattr(checkpoint_writer.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint_writer, "RETRY_SECONDS", 0.01)
    return disk


def save(writer, step, last=False):
    writer.save(None, Progress(step=step, tokens=step), last)
    writer.finish()


@pytest.mark.parametrize("failures", [1, 3, 5])
def test_failures_in_a_row_end_the_run(tmp_path, corpus, disk, capsys, failures):
    config = tiny_config(tmp_path / "run", corpus, f"train.checkpoint_failures={failures}")
    writer = CheckpointWriter(tmp_path / "run", config.train, MODEL)
    for step in range(1, failures):
        save(writer, step)
        assert f"{failures} failures in a row end the run" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=rf"No space left.*failure {failures} in a row.*there is none before it"):
        save(writer, failures)


def test_a_success_between_failures_counts_anew_and_the_last_good_one_is_kept(tmp_path, corpus, disk, capsys):
    config = tiny_config(tmp_path / "run", corpus, "train.keep_last=1", "train.checkpoint_failures=2")
    writer = CheckpointWriter(tmp_path / "run", config.train, MODEL)
    for step in range(1, 8):
        disk.full = step % 2 == 0
        save(writer, step)
        assert [int(folder.name[-1]) for folder in checkpoints(tmp_path / "run")] == [step - disk.full]
    assert "the newest whole one is" in capsys.readouterr().err


def test_the_last_checkpoint_is_tried_again_at_once(tmp_path, corpus, disk, monkeypatch):
    config = tiny_config(tmp_path / "run", corpus)
    writer = CheckpointWriter(tmp_path / "run", config.train, MODEL)
    with pytest.raises(CheckpointError, match="failure 3 in a row"):
        save(writer, 4, last=True)
    assert disk.tries == 3
    writer = CheckpointWriter(tmp_path / "run", config.train, MODEL)
    monkeypatch.setattr(checkpoint_writer.time, "sleep", lambda _: setattr(disk, "full", False))
    save(writer, 4, last=True)
    assert disk.tries == 5
    assert len(checkpoints(tmp_path / "run")) == 1


def test_an_error_beside_a_checkpoint_that_fails_hides_no_warning(tmp_path, corpus, disk, monkeypatch, capsys):
    writer = CheckpointWriter(tmp_path / "run", tiny_config(tmp_path / "run", corpus).train, MODEL)
    go_on, shutdown = threading.Event(), writer._thread.shutdown
    monkeypatch.setattr(writer._thread, "shutdown", lambda: (go_on.set(), shutdown()))
    monkeypatch.setattr(checkpoint_writer, "save_file", lambda *given: (go_on.wait(30), disk.save(*given)))
    with suppress(LongNetError), writer:
        writer.save(None, Progress(step=1, tokens=1))
        raise LongNetError("training diverged")
    assert "No space left on device" in capsys.readouterr().err
