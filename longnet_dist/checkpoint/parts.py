"""The tensors of a checkpoint: whole in one file of each kind, or in parts, of which each rank has written one.

A file with whole tensors is ``model.safetensors``. The part of rank 2 of 4 is ``model.00002-of-00004.safetensors``. Its
tensors are one-dimensional, and their names say what they are part of: ``head.weight@4096/256x32`` has the numbers of
``head.weight`` from number 4,096 on, in the order of its 256 × 32 numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longnet_dist.errors import CheckpointError

_FILE = re.compile(r"(?P<kind>.+?)(?:\.(?P<number>[0-9]{5})-of-(?P<parts>[0-9]{5}))?\.safetensors")
_PIECE = re.compile(r"(?P<name>.+)@(?P<first>[0-9]+)/(?P<shape>(?:[0-9]+(?:x[0-9]+)*)?)")


def file_name(kind: str, number: int = 0, parts: int = 1) -> str:
    """Return the name of a tensor file.

    Args:
        kind: ``model``, or the name of an optimizer's state.
        number: of the part, from 0.
        parts: number of parts; 1: the file has whole tensors.
    """
    return f"{kind}.safetensors" if parts == 1 else f"{kind}.{number:05d}-of-{parts:05d}.safetensors"


def piece_name(name: str, first: int, shape: Sequence[int]) -> str:
    """Return the name of a piece of a tensor.

    Args:
        name: of the tensor.
        first: number of the tensor's numbers before the piece.
        shape: of the whole tensor.
    """
    return f"{name}@{first}/{'x'.join(map(str, shape))}"


def files_of(names: Iterable[str], kind: str) -> list[str]:
    """Return the files of a kind among the names of files, in the order of the parts."""
    return sorted(name for name in names if (match := _FILE.fullmatch(name)) and match["kind"] == kind)


def num_parts(names: Iterable[str]) -> int:
    """Return the number of parts that tensor files say of themselves, 1 for whole ones; the largest counts."""
    return max((int(match["parts"] or 1) for name in names if (match := _FILE.fullmatch(name))), default=1)


class _Piece(NamedTuple):
    first: int
    last: int
    file: Any
    key: str


class SavedTensors:
    """The SavedTensors are tensors of one kind in a checkpoint, whichever ranks have written them.

    The files are mapped into memory, so only what is asked for is read.

    Args:
        files: all files of the kind.

    Attributes:
        shapes: of the whole tensors, by name.

    Raises:
        CheckpointError: a file is none of safetensors, or the pieces of a tensor do not make it up.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._where = files[0] if len(files) == 1 else f"the {len(files)} parts {files[0]} and so on"
        self.shapes: dict[str, torch.Size] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for path in files:
            try:
                self._add(safe_open(path, "pt"))
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"cannot read the tensors of {path}: {error}") from None
        for name, shape in self.shapes.items():
            pieces = sorted(self._pieces[name], key=lambda piece: piece[:2])
            self._pieces[name] = pieces
            edges = [0, *(piece.last for piece in pieces)]
            if edges[-1] != prod(shape) or any(a != piece.first for a, piece in zip(edges, pieces, strict=False)):
                raise CheckpointError(f"{self._where} have pieces of {name} that are not the whole tensor")

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse tensors that have other names or shapes than those of a model.

        Raises:
            CheckpointError: they are others.
        """
        for name in sorted(self.shapes.keys() | shapes.keys()):
            if self.shapes.get(name) != shapes.get(name):
                here, there = (list(part[name]) if name in part else "missing" for part in (shapes, self.shapes))
                raise CheckpointError(
                    f"{self._where} does not fit the model: the shape of {name} is {there} there and {here} here; "
                    f"use the configuration and the checkpoint of one run"
                )

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return numbers ``[first, last)`` of a tensor, one-dimensional, on the CPU; all numbers if not given."""
        last = prod(self.shapes[name]) if last is None else last
        found = [
            _numbers(piece, first, last) for piece in self._pieces[name] if first < piece.last and piece.first < last
        ]
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0), *found])

    def _add(self, file: Any) -> None:
        for key in file.keys():  # noqa: SIM118
            size = torch.Size(file.get_slice(key).get_shape())
            match = _PIECE.fullmatch(key)
            name, first = (match["name"], int(match["first"])) if match else (key, 0)
            shape = torch.Size(map(int, filter(None, match["shape"].split("x")))) if match else size
            if self.shapes.setdefault(name, shape) != shape:
                raise ValueError(f"{name} has another shape than in another part")
            self._pieces.setdefault(name, []).append(_Piece(first, first + size.numel(), file, key))


def _numbers(piece: _Piece, first: int, last: int) -> Tensor:
    """Return the numbers of a piece that are between ``first`` and ``last`` of its tensor."""
    tensor: Tensor = piece.file.get_tensor(piece.key)  # a view of the mapped file
    return tensor.flatten()[max(first - piece.first, 0) : last - piece.first]
