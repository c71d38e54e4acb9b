import os
import shutil
from pathlib import Path

import pytest

from longnet_dist.checkpoint.format import Progress, checkpoint_folder, checkpoints, tensor_files
from longnet_dist.checkpoint.run_folder import ResumePoint, RunFolder, resume_point, set_aside, write_text
from longnet_dist.checkpoint.writer import write_checkpoint
from longnet_dist.config.model import LongNetConfig
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import CheckpointError, ConfigError
from tests.train.runs import tiny_config

MODEL = LongNetConfig(name="tiny")


def add_checkpoint(run, step):
    """A checkpoint of ``MODEL`` without tensors."""
    snapshot = {name: {} for name in tensor_files()}
    write_checkpoint(checkpoint_folder(run, step), snapshot, MODEL, Progress(step=step, tokens=10 * step))
    return checkpoint_folder(run, step)


def chosen(run, resume):
    return resume_point(RunFolder(run), str(resume), MODEL).checkpoint


def damage(checkpoint):
    (checkpoint / "exp_avg.safetensors").write_bytes(b"torn")


def test_what_is_described_is_read_back(tmp_path, corpus):
    config = tiny_config(tmp_path / "run", corpus, "train.adam_betas=[0.8,0.9]")
    folder = RunFolder(tmp_path / "run")
    folder.describe(config.model_dump(mode="json"), ByteTokenizer())
    assert folder.config() == config
    assert folder.tokenizer().encode(b"ab").tolist() == [97, 98]


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run's folder"):
        RunFolder(tmp_path).config()
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json"):
        RunFolder(tmp_path).tokenizer()


def test_auto_takes_the_newest_or_starts_anew(tmp_path):
    assert chosen(tmp_path, "auto") is None
    add_checkpoint(tmp_path, 9)
    newest = add_checkpoint(tmp_path, 10)
    assert chosen(tmp_path, "auto") == newest


def test_auto_passes_over_damaged_checkpoints(tmp_path, capsys):
    intact, torn, empty = (add_checkpoint(tmp_path, step) for step in (10, 20, 30))
    damage(torn)
    (empty / "state.json").unlink()
    point = resume_point(RunFolder(tmp_path), "auto", MODEL)
    assert (point.checkpoint, point.state.step, list(point.damaged)) == (intact, 10, [empty, torn])
    set_aside(point.damaged)
    assert checkpoints(tmp_path) == [intact]
    assert (tmp_path / "checkpoints" / "damaged_0_step_00000020" / "exp_avg.safetensors").read_bytes() == b"torn"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[1].startswith(f"passed over a checkpoint: {torn / 'exp_avg.safetensors'} is missing or damaged")
    damage(add_checkpoint(tmp_path, 20))
    set_aside(resume_point(RunFolder(tmp_path), "auto", MODEL).damaged)
    assert (tmp_path / "checkpoints" / "damaged_1_step_00000020").is_dir()


def test_auto_does_not_begin_anew_where_all_are_damaged(tmp_path):
    damage(add_checkpoint(tmp_path, 10))
    with pytest.raises(CheckpointError, match=r"all checkpoints of the run are damaged.*exp_avg"):
        chosen(tmp_path, "auto")


def test_auto_does_not_pass_over_another_model(tmp_path):
    add_checkpoint(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"another model: model\.layers"):
        resume_point(RunFolder(tmp_path), "auto", MODEL.model_copy(update={"layers": 9}))


def test_a_damaged_checkpoint_that_is_named_is_an_error(tmp_path):
    damage(add_checkpoint(tmp_path / "source", 10))
    with pytest.raises(CheckpointError, match="missing or damaged"):
        chosen(tmp_path / "new", tmp_path / "source")


def test_never_refuses_a_folder_in_use(tmp_path):
    folder = RunFolder(tmp_path)
    assert resume_point(folder, "never", MODEL) == ResumePoint()
    folder.metrics_file.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"already holds a run, which train\.resume=never would overwrite"):
        resume_point(folder, "never", MODEL)


def test_a_path_starts_a_new_folder_from_a_checkpoint_of_another(tmp_path):
    source = add_checkpoint(tmp_path / "source", 5)
    assert chosen(tmp_path / "new", source) == source
    assert chosen(tmp_path / "new", tmp_path / "source") == source


def test_a_path_may_name_the_newest_of_its_own_folder_only(tmp_path):
    older, newest = add_checkpoint(tmp_path, 5), add_checkpoint(tmp_path, 10)
    assert chosen(tmp_path, newest) == newest
    with pytest.raises(ConfigError, match="already holds a run"):
        chosen(tmp_path, older)
    shutil.rmtree(newest)
    assert chosen(tmp_path, older) == older


def test_a_path_to_nothing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor"):
        chosen(tmp_path / "run", tmp_path / "nowhere")


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    RunFolder(tmp_path / "a" / "b").check_writable()
    with pytest.raises(ConfigError, match=r"file is no folder"):
        RunFolder(tmp_path / "file" / "run").check_writable()
    with pytest.raises(ConfigError, match="cannot be used"):
        RunFolder(tmp_path / ("x" * 300)).check_writable()


@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("checkpoints", Path.touch),
        ("checkpoints", lambda path: path.symlink_to("nowhere")),
        ("tensorboard", Path.touch),
        ("flight_recorder", os.mkfifo),
        ("metrics.jsonl", Path.mkdir),
        ("validation.jsonl", Path.mkdir),
        ("config.yaml", Path.mkdir),
        ("tokenizer.json", Path.mkdir),
        ("loss.png", Path.mkdir),
        ("sample.txt", os.mkfifo),
    ],
)
def test_what_lies_where_a_run_writes_is_refused_before_it_starts(tmp_path, name, put):
    put(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name}, but what is there is no (file|folder); move it away, or use"):
        RunFolder(tmp_path).check_writable()


def test_links_to_files_and_folders_of_a_run_are_used(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere" / "not_yet")
    RunFolder(tmp_path / "run").check_writable()


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "new")]
