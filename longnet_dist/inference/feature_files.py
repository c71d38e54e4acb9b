"""Files with the features of one sequence each, and the coordinates of its rows: HDF5, .npy and .pt."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet_dist.errors import DataError
from longnet_dist.extras import require_extra

HDF5 = (".h5", ".hdf5")
SUFFIXES = (*HDF5, ".npy", ".pt", ".pth")
COORDINATES = ".coords.npy"
"""``NAME.coords.npy`` has the coordinates of ``NAME.npy``."""
_FEATURES, _COORDS = ("features", "feats"), ("coords", "coordinates")


def feature_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their names without suffix, in alphabetical order.

    Raises:
        DataError: the folder is not there or has no such file, or two files have one name.
        MissingExtraError: there are HDF5 files, but no h5py.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of features ({', '.join(SUFFIXES)})")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or path.name.endswith(COORDINATES):
            continue
        if path.stem in found:
            raise DataError(f"{found[path.stem].name} and {path.name} in {folder} have one name; keep one of them")
        found[path.stem] = path
    if not found:
        raise DataError(f"{folder} has no file of features ({', '.join(SUFFIXES)})")
    if any(path.suffix in HDF5 for path in found.values()):
        require_extra("hdf5", "reading HDF5 files")
    return found


def read_features(path: Path) -> tuple[Tensor, Tensor | None]:
    """Return features ``(n, F)`` and coordinates ``(n, C)`` of a file; None if it has no coordinates.

    HDF5 files and dictionaries of .pt files keep them under ``features`` and ``coords``. A tensor alone, and a .npy
    file, are features. A leading dimension of 1 is dropped. Nothing is unpickled but tensors.

    Raises:
        DataError: the file cannot be read, or has other contents.
    """
    try:
        features, coords = _read(path)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise DataError(f"cannot read the features of {path}: {str(error).splitlines()[0]}") from None
    features, coords = _rows(features), None if coords is None else _rows(coords)
    if features.dim() != 2 or not features.is_floating_point() or not len(features):
        raise DataError(f"{path} must have features (rows, channels), but they are {_shown(features)}")
    if coords is not None and (coords.dim() != 2 or len(coords) != len(features)):
        raise DataError(f"{path} must have coordinates of {len(features)} rows, but they are {_shown(coords)}")
    return features, coords


def _read(path: Path) -> tuple[Any, Any]:
    if path.suffix in HDF5:
        import h5py

        with h5py.File(path) as file:
            contents = {name: file[name][()] for name in (*_FEATURES, *_COORDS) if name in file}
        return _chosen(contents)
    if path.suffix == ".npy":
        beside = path.with_name(path.stem + COORDINATES)
        coords = np.load(beside, allow_pickle=False) if beside.exists() else None
        return np.load(path, allow_pickle=False), coords
    found = torch.load(path, map_location="cpu", weights_only=True)
    return _chosen(found) if isinstance(found, dict) else (found, None)


def _chosen(contents: dict[str, Any]) -> tuple[Any, Any]:
    features = next((contents[name] for name in _FEATURES if name in contents), None)
    if features is None:
        raise KeyError(f"there is no {_FEATURES[0]!r} among {sorted(map(str, contents))}")
    return features, next((contents[name] for name in _COORDS if name in contents), None)


def _rows(values: Any) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor[0] if tensor.dim() == 3 and len(tensor) == 1 else tensor


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"
