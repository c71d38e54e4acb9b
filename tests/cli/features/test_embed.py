"""The command embeds files of every kind, resumes, and names what it cannot embed."""

import logging

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from longnet_dist.cli.features import embed
from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import CheckpointError, ConfigError, DataError
from longnet_dist.inference.features import embedding
from longnet_dist.interop.gigapath import slide_config
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.pretrained import from_pretrained, save_pretrained
from tests.interop.drawn import places


def run(*words):
    embed.main([str(word) for word in words])


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = slide_config(2, 32, 4, 2, feature_dim=12)
    save_pretrained(LongNetEncoder(config), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def slides(tmp_path):
    folder, slides = tmp_path / "slides", {}
    folder.mkdir()
    for number, name in enumerate(("a", "b", "c", "d")):
        slides[name] = torch.randn(10 + number, 12), places(10 + number, 8)[0]
    x, coords = slides["a"]
    with h5py.File(folder / "a.h5", "w") as file:
        file["features"], file["coords"] = x.numpy()[None], coords.numpy().astype(np.int64)
    np.save(folder / "b.npy", slides["b"][0].numpy())
    np.save(folder / "b.coords.npy", slides["b"][1].numpy())
    torch.save({"features": slides["c"][0], "coords": slides["c"][1]}, folder / "c.pt")
    torch.save({"feats": slides["d"][0][None], "coords": slides["d"][1][None]}, folder / "d.pth")
    (folder / "notes.txt").write_text("mine")
    return folder, slides


def test_vectors_are_the_encoders(model, slides, tmp_path, capsys):
    folder, contents = slides
    run(model, folder, "--output", tmp_path / "vectors.safetensors")
    run(model, folder, "--output", tmp_path / "layers.safetensors", "--all-layers")
    assert capsys.readouterr().out.startswith(f"4 new vectors in {tmp_path / 'vectors.safetensors'}\n4 new vectors")
    vectors, layers = (load_file(tmp_path / f"{name}.safetensors") for name in ("vectors", "layers"))
    encoder = from_pretrained(model)
    assert vectors.keys() == layers.keys() == contents.keys()
    for name, (x, coords) in contents.items():
        out = encoder(features=x[None], coords=coords[None], hidden_states=True)
        torch.testing.assert_close(vectors[name], out.pooled[0])
        torch.testing.assert_close(layers[name], torch.cat(out.pooled_states))


def test_it_resumes_after_an_interrupt(model, slides, tmp_path, monkeypatch, capsys):
    folder, output, read = slides[0], tmp_path / "vectors.safetensors", []
    original = embedding.encode_file

    def interrupted(encoder, file, *options):
        read.append(file.path.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        return original(encoder, file, *options)

    monkeypatch.setattr(embedding, "encode_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, folder, "--output", output)
    assert load_file(output).keys() == {"a", "b"}
    run(model, folder, "--output", output)
    assert read == ["a.h5", "b.npy", "c.pt", "c.pt", "d.pth"]
    assert capsys.readouterr().out == f"2 new vectors in {output}\n"
    assert load_file(output).keys() == {"a", "b", "c", "d"}
    with safe_open(output, "pt") as file:
        assert file.metadata()["all_layers"] == "False"
    with pytest.raises(CheckpointError, match="was made with all_layers=False, but here all_layers=True; use another"):
        run(model, folder, "--output", output, "--all-layers")


def test_files_that_fail_are_named_and_the_others_are_written(model, slides, tmp_path):
    folder = slides[0]
    torch.save({"features": torch.randn(5, 11), "coords": torch.zeros(5, 2)}, folder / "narrow.pt")
    torch.save(logging.Logger, folder / "code.pt")
    np.save(folder / "placeless.npy", np.zeros((4, 12), np.float32))
    (folder / "torn.h5").write_bytes(b"no")
    with pytest.raises(DataError) as caught:
        run(model, folder, "--output", tmp_path / "out.safetensors")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("4 of 8 files have no result; mend them or take them away")
    assert [line.split(":")[0] for line in lines[1:]] == ["code.pt", "narrow.pt", "placeless.npy", "torn.h5"]
    assert "has 11 channels, but the model takes 12" in lines[2]
    assert (
        "has no coordinates, but the model needs 2 (model.coordinates); keep them in placeless.coords.npy" in lines[3]
    )
    assert len(load_file(tmp_path / "out.safetensors")) == 4


def test_what_is_left_out_and_warnings_come_once_at_the_end(model, slides, tmp_path, capsys):
    folder = slides[0]
    for name in ("e", "f"):
        torch.save({"features": torch.randn(6, 12), "coords": torch.zeros(6, 2)}, folder / f"{name}.pt")
    run(model, folder, "--output", tmp_path / "out.safetensors")
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines[0].startswith(f"left out: 1 in {folder} that do not end in .h5")
    assert lines[0].endswith("first notes.txt")
    assert lines[1].startswith("warning for 2 files, first e.pt: 5 of 6 coordinates land on a place")


def test_an_output_that_cannot_be_written_is_refused_first(model, slides, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "encode_file", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output=.* cannot be used: .*file is no folder"):
        run(model, slides[0], "--output", tmp_path / "file" / "out.safetensors")
    with pytest.raises(CheckpointError, match="is no file that longnet embed wrote"):
        run(model, slides[0], "--output", tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--output=.* must be a file, but is a folder"):
        run(model, slides[0], "--output", tmp_path)


def test_faults_that_are_told_before_anything_is_read(model, slides, tmp_path):
    folder = slides[0]
    with pytest.raises(DataError, match="is no folder of features"):
        run(model, tmp_path / "none", "--output", tmp_path / "out")
    (folder / "a.pt").write_bytes(b"")
    with pytest.raises(DataError, match=r"a.h5 and a.pt in .* have one name"):
        run(model, folder, "--output", tmp_path / "out")
    plain = EncoderConfig(dim=32, layers=1, heads=4, segment_lengths=[8], dilation_rates=[1])
    save_pretrained(LongNetEncoder(plain), tmp_path / "plain")
    with pytest.raises(ConfigError, match="no encoder with a pool"):
        run(tmp_path / "plain", folder, "--output", tmp_path / "out")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_devices_that_are_not_there(device, model, slides, tmp_path):
    with pytest.raises(ConfigError, match=rf"--device={device} is no device of this machine; it has cpu"):
        run(model, slides[0], "--output", tmp_path / "out", "--device", device)
