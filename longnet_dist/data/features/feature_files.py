"""Files with the features of one sequence each, and the coordinates of its rows: HDF5, .npy and .pt.

HDF5 files and dictionaries of .pt files keep them under ``features`` and ``coords``. A tensor alone, and a .npy file,
are features. A leading dimension of 1 is dropped. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet_dist.errors import DataError, refused_object
from longnet_dist.extras import require_extra

HDF5 = (".h5", ".hdf5")
SUFFIXES = (*HDF5, ".npy", ".pt", ".pth")
COORDINATES = ".coords.npy"
"""``NAME.coords.npy`` has the coordinates of ``NAME.npy``."""
_FEATURES, _COORDS = ("features", "feats"), ("coords", "coordinates")
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError)
_NUMBERS = ("float", "int", "uint")


@dataclass(frozen=True)
class FeatureFile:
    """A FeatureFile is what the header of a file says.

    Attributes:
        path: of the file.
        rows: number of rows ``n``, at least 1.
        channels: of the features, ``F``.
        coordinates: of a row, ``C``; 0 if the file has none.
        size: of the file, bytes.
    """

    path: Path
    rows: int
    channels: int
    coordinates: int
    size: int

    @classmethod
    def of(cls, path: Path) -> FeatureFile:
        """Read the shapes of a file, without its features.

        Raises:
            DataError: the file cannot be read, or has other contents.
        """
        with _opened(path) as (features, coords):
            rows, channels = features.shape[-2:]
            width = 0 if coords is None else coords.shape[-1]
            return cls(path, int(rows), int(channels), int(width), path.stat().st_size)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Read rows ``[start, stop)``: features ``(n, F)`` and coordinates ``(n, C)``, on the CPU.

        Raises:
            DataError: the file cannot be read, has changed, or has numbers that are not finite.
        """
        with _opened(self.path) as (features, coords):
            if tuple(features.shape[-2:]) != (self.rows, self.channels):
                raise DataError(
                    f"{self.path} has changed: its features were {(self.rows, self.channels)} and are "
                    f"{tuple(features.shape[-2:])}; put the file back, or begin a new run"
                )
            x = _finite(self.path, "features", _rows(features, start, stop), start)
            if coords is None or not self.coordinates:
                return x, x.new_empty(len(x), 0)
            return x, _finite(self.path, "coordinates", _rows(coords, start, stop), start)


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
        if not _has_features(path):
            continue
        if path.stem in found:
            raise DataError(f"{found[path.stem].name} and {path.name} in {folder} have one name; keep one of them")
        found[path.stem] = path
    if not found:
        note = "; ".join(other_files(folder))
        raise DataError(f"{folder} has no file of features ({', '.join(SUFFIXES)}){note and f'; {note}'}")
    if any(path.suffix in HDF5 for path in found.values()):
        require_extra("hdf5", "reading HDF5 files")
    return found


def other_files(folder: Path) -> list[str]:
    """Return, for people, how many files of a folder have no features; one line or none.

    Coordinates beside their features are none of them, nor are hidden files.
    """
    others = [
        path.name
        for path in sorted(folder.iterdir())
        if not (path.name.startswith(".") or _has_features(path) or _has_coordinates(path))
    ]
    if not others:
        return []
    return [f"left out: {len(others)} in {folder} that do not end in {', '.join(SUFFIXES)}, first {others[0]}"]


def _has_features(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.is_file() and not path.name.endswith(COORDINATES)


def _has_coordinates(path: Path) -> bool:
    """Say whether a file has the coordinates of a .npy file in the same folder."""
    return path.name.endswith(COORDINATES) and path.with_name(path.name.removesuffix(COORDINATES) + ".npy").is_file()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open features and coordinates of a file, which may be read in parts, and check their shapes."""
    try:
        with _contents(path) as (features, coords):
            _check(path, features, coords)
            yield features, coords
    except DataError:
        raise
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot read the features of {path}: {reason}") from None


@contextmanager
def _contents(path: Path) -> Iterator[tuple[Any, Any]]:
    if path.suffix in HDF5:
        import h5py

        with h5py.File(path) as file:
            yield _chosen({name: file[name] for name in (*_FEATURES, *_COORDS) if name in file})
    elif path.suffix == ".npy":
        beside = path.with_name(path.stem + COORDINATES)
        coords = np.load(beside, mmap_mode="r", allow_pickle=False) if beside.exists() else None
        yield np.load(path, mmap_mode="r", allow_pickle=False), coords
    else:
        found = _tensors(path)
        yield _chosen(found) if isinstance(found, dict) else (found, None)


def _tensors(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # the error says what there is to say
            warnings.simplefilter("ignore")
            # Files of torch before 1.6 are no archives, and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a file of another kind makes torch's unpickler raise errors of many kinds
        if found := refused_object(error):
            raise ValueError(f"it holds {found}, and nothing but tensors is read; save tensors alone") from None
        raise ValueError(f"torch.save did not write it, or it is cut off or damaged ({type(error).__name__})") from None


def _chosen(contents: dict[str, Any]) -> tuple[Any, Any]:
    features = next((contents[name] for name in _FEATURES if name in contents), None)
    if features is None:
        raise KeyError(f"there is no {_FEATURES[0]!r} among {sorted(map(str, contents))}")
    return features, next((contents[name] for name in _COORDS if name in contents), None)


def _check(path: Path, features: Any, coords: Any) -> None:
    shape = _shape(features)
    if len(shape) != 2 or not shape[0] * shape[1] > 0 or not _kind(features).startswith("float"):
        raise DataError(
            f"{path} must have features (rows, channels) of floating-point numbers, at least one row, but they are "
            f"{_shown(features)}; extract them again"
        )
    place = shape if coords is None else _shape(coords)
    if len(place) != 2 or place[0] != shape[0] or (coords is not None and not _kind(coords).startswith(_NUMBERS)):
        raise DataError(
            f"{path} must have coordinates of {shape[0]} rows, numbers, but they are {_shown(coords)}; write them again"
        )


def _kind(values: Any) -> str:
    """Return the name of the dtype of an array or tensor, whatever its byte order; "float…" for bfloat16."""
    if isinstance(values, Tensor):
        return str(values.dtype).removeprefix("torch.b").removeprefix("torch.")
    return str(values.dtype.name)


def _shape(values: Any) -> tuple[int, ...]:
    """Return the shape without a leading dimension of 1."""
    shape = tuple(getattr(values, "shape", ()))
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _rows(values: Any, start: int, stop: int) -> Tensor:
    part = values[0, start:stop] if len(values.shape) == 3 else values[start:stop]
    if isinstance(part, Tensor):
        return part.clone()
    rows = np.array(part)
    return torch.from_numpy(rows.astype(rows.dtype.newbyteorder("="), copy=False))


def _finite(path: Path, what: str, rows: Tensor, start: int) -> Tensor:
    bad = ~torch.isfinite(rows).all(1)
    if bad.any():
        first = start + int(bad.nonzero()[0])
        raise DataError(
            f"{path} has {what} that are not finite in {int(bad.sum())} rows, the first is row {first}; extract them "
            "again, or take the file away"
        )
    return rows


def _shown(values: Any) -> str:
    return f"{tuple(getattr(values, 'shape', ()))} of {getattr(values, 'dtype', type(values).__name__)}"
