"""A folder of features: what its files may have, which are kept for validation, and how they are packed."""

import itertools

import h5py
import numpy as np
import pytest
import torch

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.schema import DataConfig
from longnet_dist.data.features.feature_batches import FeatureBatches
from longnet_dist.data.features.feature_files import FeatureFile, feature_files
from longnet_dist.data.features.feature_set import FeatureSet
from longnet_dist.data.features.labels import read_labels
from longnet_dist.errors import ConfigError, DataError
from tests.train.features.slides import MODEL, write_slides

ENCODER = EncoderConfig(**MODEL)


@pytest.fixture
def folder(tmp_path):
    return write_slides(tmp_path, 20)


def opened(folder, model=ENCODER, **fields):
    return FeatureSet.open(DataConfig(features=folder / "slides", **fields), model)


@pytest.mark.parametrize("kind", ["h5", "npy", "pt", "old.pt"])
def test_files_are_read_in_parts(tmp_path, kind):
    x, coords, path = torch.randn(9, 4), torch.arange(18).view(9, 2), tmp_path / f"a.{kind}"
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = x.numpy()[None], coords.numpy()
    elif kind == "npy":
        np.save(path, x.numpy())
        np.save(tmp_path / "a.coords.npy", coords.numpy())
    else:
        contents = {"features": x, "coords": coords}
        torch.save(contents, path, _use_new_zipfile_serialization=kind == "pt")
    file = FeatureFile.of(path)
    assert (file.rows, file.channels, file.coordinates) == (9, 4, 2)
    part, places = file.read(2, 7)
    assert torch.equal(part, x[2:7])
    assert torch.equal(places, coords[2:7])


def test_every_bad_file_is_named(folder):
    slides = folder / "slides"
    torch.save({"features": torch.zeros(4, 11), "coords": torch.zeros(4, 2)}, slides / "narrow.pt")
    torch.save({"features": torch.zeros(0, 12), "coords": torch.zeros(0, 2)}, slides / "empty.pt")
    torch.save(torch.zeros(4, 12), slides / "placeless.pt")
    (slides / "torn.pt").write_bytes(b"no")
    with pytest.raises(DataError) as caught:
        opened(folder)
    first, *lines = str(caught.value).splitlines()
    assert first == "4 of 24 files of features cannot be used; mend them or take them away:"
    for name, reason in (
        ("empty.pt", "must have features"),
        ("narrow.pt", "11 channels, but the model takes 12"),
        ("placeless.pt", "no coordinates, but the model needs 2"),
        ("torn.pt", "cannot read the features"),
    ):
        assert any(name in line and reason in line for line in lines)


def test_numbers_that_are_not_finite_are_found_where_they_are_read(folder):
    path = folder / "slides" / "bad.pt"
    x = torch.zeros(9, 12)
    x[5, 1] = torch.inf
    torch.save({"features": x, "coords": torch.zeros(9, 2)}, path)
    file = FeatureFile.of(path)
    file.read(0, 5)
    with pytest.raises(DataError, match=r"bad\.pt has features that are not finite in 1 rows, the first is row 5"):
        file.read(2, 9)


def test_validation_is_a_share_of_each_class_and_does_not_move(folder):
    features = opened(folder, labels=folder / "labels.csv", validation_share=0.3)
    kept = features.names("validation")
    assert [features.labels[name] for name in kept].count(0) == 3
    assert [features.labels[name] for name in kept].count(1) == 3
    assert sorted(kept + features.names("train")) == features.names("all") == sorted(features.files)
    (folder / "slides" / "s3.npy").unlink()
    after = opened(folder, labels=folder / "labels.csv", validation_share=0.3).names("validation")
    assert len(set(kept) - set(after)) <= 1
    (folder / "kept.txt").write_text("s1\n\ns2\n")
    features = opened(folder, validation_names=folder / "kept.txt")
    assert features.names("validation") == ["s1", "s2"]
    (folder / "kept.txt").write_text("s1\nmissing\n")
    with pytest.raises(DataError, match="names missing, which is none of the files"):
        opened(folder, validation_names=folder / "kept.txt")
    with pytest.raises(DataError, match=r"the validation split .* has none of its 19 files"):
        opened(folder, validation_share=0.0).names("validation")


def test_the_fingerprint_covers_files_labels_and_split(folder):
    before = opened(folder, labels=folder / "labels.csv").fingerprint()
    assert opened(folder, labels=folder / "labels.csv").fingerprint() == before
    assert opened(folder, labels=folder / "labels.csv", validation_share=0.5).fingerprint() != before
    lines = (folder / "labels.csv").read_text().replace("s1,odd", "s1,even")
    (folder / "labels.csv").write_text(lines)
    assert opened(folder, labels=folder / "labels.csv").fingerprint()["labels"] != before["labels"]
    (folder / "slides" / "s1.pt").unlink()
    changed = opened(folder, labels=folder / "labels.csv").fingerprint()
    assert changed["list of feature files"] != before["list of feature files"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "s1,odd,3\n", "line 1 of .* must have a name and a label"),
        ("a.csv", "s1,odd\ns1,even\n", "gives s1 two labels, odd and even"),
        ("a.csv", "s1;odd\n", "line 1 of .* must have .* with a comma between them"),
        ("a.csv", "", "has no labels"),
        ("a.csv", "x,odd\ny,even\n", "none of the 2 names in .* is one of the 20 files"),
        ("a.csv", "s1,odd\ns2,odd\n", "one class, odd"),
        ("a.jsonl", '{"name": "s1"}\n', "line 1 of .* must have a name and a label"),
        ("a.jsonl", "no\n", "cannot read the labels"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        opened(folder, labels=folder / name)


def test_labels_are_read_from_both_kinds_of_file(folder):
    (folder / "a.csv").write_text("s1, odd\ns2,even\ns2,even\n")
    (folder / "a.jsonl").write_text('{"name": "s1", "label": "odd"}\n\n{"name": "s2", "label": "even", "site": 3}\n')
    paths = feature_files(folder / "slides")
    assert read_labels(folder / "a.csv", paths) == read_labels(folder / "a.jsonl", paths)
    assert read_labels(folder / "a.csv", paths).numbers == {"s1": 1, "s2": 0}
    (folder / "a.csv").write_text("s1.pt,odd\ns2,even\n")  # with or without suffix
    features = opened(folder, labels=folder / "a.csv")
    assert features.labels == {"s1": 1, "s2": 0}
    assert len(features.left_out) == 18
    with pytest.raises(ConfigError, match=r"needs the classes of the files; give data\.labels"):
        opened(folder, task="classification")
    with pytest.raises(ConfigError, match="takes no labels"):
        opened(folder, task="masked_features", labels=folder / "a.csv")


@pytest.mark.parametrize("header", ["name,label", "slide_id,label", "Slide,Diagnosis"])
def test_a_header_is_no_class_and_is_told(folder, header):
    (folder / "a.csv").write_text(f"{header}\n" + (folder / "labels.csv").read_text())
    features = opened(folder, labels=folder / "a.csv")
    assert features.classes == ("even", "odd")
    assert features.omissions() == [f"line 1 of {folder / 'a.csv'} is taken as its header: {header}"]
    assert features.labels == opened(folder, labels=folder / "labels.csv").labels


def test_what_is_left_out_is_counted(folder):
    """Names of no file give no class, wherever they are; an absent slide in the first line is no header."""
    (folder / "a.csv").write_text("gone,odd\ns1,odd\ns2,even\nlost,rare\n")
    (folder / "slides" / "notes.txt").write_text("mine")
    (folder / "slides" / "more").mkdir()
    (folder / "slides" / ".hidden").write_text("")
    features = opened(folder, labels=folder / "a.csv")
    assert features.classes == ("even", "odd")
    assert features.omissions() == [
        "left out: 18 without a label, first s0",
        f"left out: 2 of 4 lines of {folder / 'a.csv'}, which name no file, first gone",
        f"left out: 2 in {folder / 'slides'} that do not end in .h5, .hdf5, .npy, .pt, .pth, first more",
    ]
    assert features.report().splitlines()[1:] == features.omissions()
    (folder / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has no file of features.*left out: 1 in .*first inner"):
        feature_files(folder / "empty")


def test_slices_of_packed_files_are_the_files(folder):
    features = opened(folder, labels=folder / "labels.csv")
    batches = FeatureBatches(features, features.names("train"), 4, seed=3, cls_token=True)
    packed = batches.packed(5)
    assert packed.rows == sum(file.rows + 1 for file in packed.files)
    whole = torch.cat([file.read(0, file.rows)[0].float() for file in packed.files])
    edges = [0, 1, 7, packed.documents.stops[1], packed.documents.stops[1] + 1, packed.rows]
    windows = list(itertools.pairwise(edges))
    assert torch.equal(torch.cat([packed.read(window)[0][0].float() for window in windows]), whole)
    hidden = packed.hidden((0, packed.rows), 0.6)
    assert torch.equal(torch.cat([packed.hidden(window, 0.6) for window in windows], 1), hidden)
    assert 0.3 < hidden.double().mean() < 0.9
    labels = torch.stack([packed.own_labels(window) for window in windows])
    assert (labels >= 0).sum(0).tolist() == [1] * 4
    assert labels.max(0).values.tolist() == list(packed.labels)


def test_an_epoch_visits_every_file_once_in_an_order_of_its_own(folder):
    features = opened(folder)
    batches = FeatureBatches(features, features.names("all"), 4, seed=1, cls_token=False)
    steps = [[file.path.stem for file in batches.packed(step).files] for step in range(10)]
    first, second = (list(itertools.chain(*part)) for part in (steps[:5], steps[5:]))
    assert sorted(first) == sorted(second) == features.names("all")
    assert first != second
    parts = [batches.packed(2, rank, 2, number, 2).files for rank in range(2) for number in range(2)]
    assert tuple(itertools.chain(*parts)) == batches.packed(2).files
