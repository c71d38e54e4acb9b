"""Embedding a folder of sequences: one vector, or one of each layer, for every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longnet_dist.data.features.feature_files import FeatureFile
from longnet_dist.errors import ConfigError
from longnet_dist.inference.features.feature_runs import load_encoder
from longnet_dist.inference.features.folder_results import ResultsFile, add_results
from longnet_dist.model.encoder import LongNetEncoder


def embed_folder(
    model: Path, folder: Path, output: Path, device: torch.device, dtype: torch.dtype, all_layers: bool = False
) -> tuple[int, list[str]]:
    """Write the vectors of all files of a folder into a safetensors file, by their names without suffix.

    A file that exists, of the same model, is continued. A file that cannot be embedded is left out and named at the
    end.

    Args:
        model: folder with an encoder that has a pool, as ``longnet convert`` writes it, or a run on features.
        folder: with features, see :mod:`longnet_dist.data.features.feature_files`.
        output: the file, with a float32 vector ``(E,)`` for each name, or ``(layers + 1, E)``.
        device, dtype: where and how precisely to compute.
        all_layers: write the vectors of the embedded rows and of every block's output.

    Returns:
        The number of files that were embedded now; and for people, what was left out and warnings, a line each.

    Raises:
        LongNetError: no such model or folder, an output of another model, or, at the end, files that failed.
    """
    encoder, sha256 = load_encoder(model, device)
    if encoder.config.pool == "none":
        raise ConfigError(f"{model} holds no encoder with a pool, and longnet embed writes pools; convert one")
    encoder = encoder.to(dtype)

    def compute(file: FeatureFile) -> Tensor:
        out = encode_file(encoder, file, all_layers)
        vectors: Tensor = torch.cat(out.pooled_states) if all_layers else out.pooled[0]
        return vectors.float().cpu().clone()

    made_with = {"weights": sha256, "all_layers": str(all_layers), "dtype": str(dtype)}
    return add_results(folder, encoder.config, _Vectors(output, made_with), compute)


@torch.inference_mode()
def encode_file(encoder: LongNetEncoder, file: FeatureFile, hidden_states: bool = False) -> Any:
    """Return the :class:`EncoderOutput` of the sequence of a file, in the encoder's precision and on its device.

    Raises:
        DataError: the file cannot be read.
        ShapeError: it does not fit.
    """
    features, coords = file.read(0, file.rows)
    parameter = next(encoder.parameters())
    places = coords[None].to(parameter.device) if coords.shape[1] and takes_coordinates(encoder) else None
    return encoder(features=features[None].to(parameter), coords=places, hidden_states=hidden_states)


def takes_coordinates(encoder: LongNetEncoder) -> bool:
    """Say whether an encoder adds positions that follow from coordinates."""
    return encoder.config.position_embedding == "sincos"


class _Vectors(ResultsFile):
    command: ClassVar[str] = "longnet embed"

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        try:
            with safe_open(self.path, "pt") as file:
                return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(str(error)) from None

    def _write(self, results: dict[str, Tensor], partial: Path) -> None:
        try:
            save_file(results, partial, self.made_with)
        except SafetensorError as error:
            raise OSError(str(error)) from None
