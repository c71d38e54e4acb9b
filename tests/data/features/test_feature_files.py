"""Files of features: numbers of every kind and byte order are read, and everything else is one short message."""

import os
import warnings

import h5py
import numpy as np
import pytest
import torch

from longnet_dist.data.features.feature_files import FeatureFile
from longnet_dist.errors import DataError

X = np.arange(12, dtype=np.float32).reshape(4, 3)
C = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def written(path, features=X, coords=C):
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = features, coords
    elif path.suffix == ".npy":
        np.save(path, features)
        np.save(path.with_name(f"{path.stem}.coords.npy"), coords)
    else:
        torch.save({"features": features, "coords": coords}, path)
    return path


def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = FeatureFile.of(path)
        return file.read(0, file.rows)


@pytest.mark.parametrize("suffix", [".h5", ".npy"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", ">f2", ">f8"])
@pytest.mark.parametrize("place", ["<i4", ">i4", ">u2", "u4", "u8", "f2"])
def test_numbers_of_every_kind_and_byte_order(suffix, kind, place, tmp_path):
    x, coords = read(written(tmp_path / f"a{suffix}", X.astype(kind), C.astype(place)))
    assert torch.equal(x.double(), torch.from_numpy(X).double())
    assert torch.equal(coords.double(), torch.from_numpy(C).double())


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.bfloat16])
def test_tensors_of_every_kind(change, tmp_path):
    x, coords = read(written(tmp_path / "a.pt", change(torch.from_numpy(X)), torch.from_numpy(C)))
    assert torch.equal(x.float(), torch.from_numpy(X))
    assert torch.equal(coords, torch.from_numpy(C))


@pytest.mark.parametrize(
    ("features", "coords", "message"),
    [
        (X.astype(int), C, "of floating-point numbers, at least one row, but they are .* of int64; extract"),
        (X.astype("c8"), C, "of floating-point numbers"),
        (X[:0], C[:0], "at least one row"),
        (X, C > 0, "coordinates of 4 rows, numbers, but they are .* of bool; write them again"),
        (X, C.astype("c8"), "of complex64"),
        (X, np.full((4, 2), b"a"), r"of \|S1"),
        (X, C[:3], r"but they are \(3, 2\)"),
    ],
)
def test_what_is_no_features_or_no_coordinates(features, coords, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path / "a.h5", features, coords))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello world this is text" * 10, r"torch.save did not write it, or it is cut off or damaged \(\w+\)$"),
        (b"", "torch.save did not write it"),
        (
            {"features": X, "coords": C},
            r"it holds numpy[\w.]+reconstruct, and nothing but tensors is read; save tensors",
        ),
        ({"features": torch.from_numpy(X), "more": Code()}, "it holds posix.system, and nothing"),
    ],
)
def test_files_of_another_kind(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match=message):
        read(path)
    assert not (tmp_path / "ran").exists()
