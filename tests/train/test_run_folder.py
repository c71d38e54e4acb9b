import shutil

import pytest

from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.train.checkpoint import checkpoint_folder
from longnet_dist.train.run_folder import RunFolder, checkpoint_to_resume
from tests.train.runs import tiny_config


def add_checkpoint(run, step):
    folder = checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    return folder


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
    folder = RunFolder(tmp_path)
    assert checkpoint_to_resume(folder, "auto") is None
    add_checkpoint(tmp_path, 9)
    newest = add_checkpoint(tmp_path, 10)
    assert checkpoint_to_resume(folder, "auto") == newest


def test_never_refuses_a_folder_in_use(tmp_path):
    folder = RunFolder(tmp_path)
    assert checkpoint_to_resume(folder, "never") is None
    folder.metrics_file.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"already holds a run, which train\.resume=never would overwrite"):
        checkpoint_to_resume(folder, "never")


def test_a_path_starts_a_new_folder_from_a_checkpoint_of_another(tmp_path):
    source = add_checkpoint(tmp_path / "source", 5)
    folder = RunFolder(tmp_path / "new")
    assert checkpoint_to_resume(folder, str(source)) == source
    assert checkpoint_to_resume(folder, str(tmp_path / "source")) == source


def test_a_path_may_name_the_newest_of_its_own_folder_only(tmp_path):
    older, newest = add_checkpoint(tmp_path, 5), add_checkpoint(tmp_path, 10)
    assert checkpoint_to_resume(RunFolder(tmp_path), str(newest)) == newest
    with pytest.raises(ConfigError, match="already holds a run"):
        checkpoint_to_resume(RunFolder(tmp_path), str(older))
    shutil.rmtree(newest)
    assert checkpoint_to_resume(RunFolder(tmp_path), str(older)) == older


def test_a_path_to_nothing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor"):
        checkpoint_to_resume(RunFolder(tmp_path / "run"), str(tmp_path / "nowhere"))
