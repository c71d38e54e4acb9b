"""Names in ``checkpoints/`` that are not the trainer's: never deleted, never resumed, never in the way."""

import shutil

import pytest
import torch

from longnet_dist.checkpoint import writer
from longnet_dist.checkpoint.format import Progress, checkpoint_folder, checkpoints, read_state, tensor_files
from longnet_dist.checkpoint.run_folder import RunFolder, resume_point
from longnet_dist.checkpoint.writer import delete_old, remove_partial, write_checkpoint
from longnet_dist.config.model import LongNetConfig

MODEL = LongNetConfig(name="tiny")


def add(run, step):
    snapshot = {name: {"weight": torch.zeros(1)} for name in tensor_files()}
    write_checkpoint(checkpoint_folder(run, step), snapshot, MODEL, Progress(step=step, tokens=step))
    return checkpoint_folder(run, step)


def place_file(path):
    path.write_bytes(b"mine")


def place_folder(path):
    path.mkdir()
    (path / "notes").write_text("mine")


def place_link(path):
    place_folder(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere", target_is_directory=True)


def place_dangling(path):
    path.symlink_to("nowhere")


FOREIGN = [
    ("step_00000099.tar.gz", place_file),
    ("step_00000099.bak", place_folder),
    ("step_", place_folder),
    ("step_-1", place_folder),
    ("step_٣", place_folder),
    ("best", place_folder),
    ("step_00000099", place_file),
    ("step_00000098", place_link),
    ("step_00000097", place_dangling),
    (".step_00000099.partial", place_file),
    (".step_00000098.partial", place_link),
    (".step_x.partial", place_folder),
]


@pytest.mark.parametrize(("name", "place"), FOREIGN, ids=lambda value: getattr(value, "__name__", value))
def test_a_foreign_name_changes_nothing(tmp_path, name, place):
    run = tmp_path / "run"
    ours = [add(run, step) for step in (1, 2, 3)]
    foreign = run / "checkpoints" / name
    place(foreign)
    assert checkpoints(run) == ours
    point = resume_point(RunFolder(run), "auto", MODEL)
    assert (point.checkpoint, point.damaged) == (ours[-1], {})
    assert delete_old(run, 1) == []
    assert remove_partial(run) == []
    assert checkpoints(run) == ours[-1:]
    assert foreign.is_symlink() or foreign.exists()
    if foreign.is_dir():
        assert (foreign / "notes").read_text() == "mine"


@pytest.mark.parametrize("place", [place_file, place_link, place_dangling, place_folder])
def test_what_has_the_name_of_the_next_checkpoint_makes_room(tmp_path, capsys, place):
    run = tmp_path / "run"
    add(run, 1)
    for name in ("step_00000002", ".step_00000002.partial"):
        place(run / "checkpoints" / name)
        if place is place_link:
            (tmp_path / "run" / "elsewhere").rename(tmp_path / name)
    assert read_state(add(run, 2), MODEL).step == 2
    assert [folder.name for folder in checkpoints(run)] == ["step_00000001", "step_00000002"]
    aside = run / "checkpoints" / "foreign_0_step_00000002"
    assert aside.is_symlink() or aside.exists()
    assert (run / "checkpoints" / ".step_00000002.partial").is_symlink() or place in (place_file, place_folder)
    assert f"it is now {aside}" in capsys.readouterr().err


def test_a_failed_clean_up_is_a_message(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        add(tmp_path, step)
    monkeypatch.setattr(writer.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(16, "busy", str(path))))
    messages = delete_old(tmp_path, 1)
    assert len(messages) == 2
    assert "cannot remove" in messages[0]
    assert "busy" in messages[0]
    assert len(remove_partial(tmp_path)) == 2
    monkeypatch.undo()
    assert remove_partial(tmp_path) == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_run_without_checkpoints_and_a_file_in_their_place(tmp_path):
    assert checkpoints(tmp_path) == []
    (tmp_path / "checkpoints").write_text("mine")
    assert checkpoints(tmp_path) == remove_partial(tmp_path) == []


def test_a_folder_of_checkpoints_may_be_a_link(tmp_path):
    add(tmp_path / "disk", 1)
    (tmp_path / "run").mkdir()
    shutil.move(tmp_path / "disk" / "checkpoints", tmp_path / "big")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "big")
    add(tmp_path / "run", 2)
    assert [folder.name[-1] for folder in checkpoints(tmp_path / "run")] == ["1", "2"]
