"""Files of weights: what they may hold, and one short message for what they may not."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from longnet_dist.errors import CheckpointError
from longnet_dist.interop.state_dicts import read_file, state_dict_of

STATE = {"a.weight": torch.arange(6.0).view(2, 3)}


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def written(path, kind):
    if kind == "safetensors":
        save_file(STATE, path)
    elif kind == "legacy":
        torch.save({"model": STATE}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"model": {"module": STATE}}, path)
    return path


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.bin", "model"])
@pytest.mark.parametrize("kind", ["safetensors", "legacy", "zip"])
def test_the_content_decides_and_not_the_name(kind, name, tmp_path):
    if (kind != "safetensors") and name.endswith("safetensors"):
        pytest.skip("such a name promises safetensors")
    assert torch.equal(state_dict_of(written(tmp_path / name, kind))["a.weight"], STATE["a.weight"])


@pytest.mark.parametrize("content", [Code(), {"model": STATE, "args": Code()}, argparse.Namespace(layers=3)])
def test_code_is_named_and_does_not_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "code.pt")
    with pytest.raises(
        CheckpointError, match=r"\((posix.system|argparse.Namespace)\), and nothing else is read; if you"
    ):
        read_file("code.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"more than tensors|no file that torch.save"):
        read_file("plain.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_cut_off_or_of_another_kind(tmp_path):
    path = tmp_path / "model.pt"
    for kind in ("safetensors", "legacy", "zip"):
        whole = written(path, kind).read_bytes()
        for length in {0, 1, 9, 10, 100, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[: min(length, len(whole) - 1)])
            with pytest.raises(
                CheckpointError, match=r"(cannot read the tensors|is no file|more than tensors).*: .*\S"
            ):
                read_file(path)
    for text in (b"hello world this is text" * 10, b"{}", b'{"a": 1}', b"\x00" * 50, b"<html></html>", b"k" * 30):
        path.write_bytes(text)
        with pytest.raises(CheckpointError) as caught:
            read_file(path)
        assert "more than tensors" not in str(caught.value)
    with pytest.raises(CheckpointError, match="No such file"):
        read_file(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_file(tmp_path)


def test_what_holds_itself_ends(tmp_path):
    inside = {}
    inside["model"] = inside
    torch.save(inside, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"found keys \['model'\]; give the state dict itself"):
        state_dict_of(tmp_path / "model.pt")
