"""Embedding a folder of sequences: one vector, or one of each layer, for every file."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from longnet_dist.data.features.feature_files import feature_files, read_features
from longnet_dist.errors import CheckpointError, ConfigError, DataError, LongNetError, ShapeError
from longnet_dist.inference.feature_runs import load_encoder
from longnet_dist.model.encoder import LongNetEncoder

SECONDS_BETWEEN_WRITES = 60.0


def embed_folder(
    model: Path, folder: Path, output: Path, device: torch.device, dtype: torch.dtype, all_layers: bool = False
) -> int:
    """Write the vectors of all files of a folder into a safetensors file, by their names without suffix.

    A file that exists, of the same model, is continued. It is written every minute, at the end, and on an interrupt. A
    file that cannot be embedded is left out and named at the end.

    Args:
        model: folder with an encoder that has a pool, as ``longnet convert`` writes it, or a run on features.
        folder: with features, see :mod:`longnet_dist.data.features.feature_files`.
        output: the file, with a float32 vector ``(E,)`` for each name, or ``(layers + 1, E)``.
        device, dtype: where and how precisely to compute.
        all_layers: write the vectors of the embedded rows and of every block's output.

    Returns:
        The number of files that were embedded now.

    Raises:
        LongNetError: no such model or folder, an output of another model, or, at the end, files that failed.
    """
    encoder, sha256 = load_encoder(model, device)
    if encoder.config.pool == "none":
        raise ConfigError(f"{model} holds no encoder with a pool, and longnet embed writes pools; convert one")
    files = feature_files(folder)
    task = {"weights": sha256, "all_layers": str(all_layers), "dtype": str(dtype)}
    vectors = _done(output, task)
    before, failed = len(vectors), []
    encoder, written = encoder.to(dtype), time.monotonic()
    try:
        for name, path in tqdm(files.items(), unit="file", disable=None, leave=False):
            if name in vectors:
                continue
            try:
                vectors[name] = _embed(encoder, path, device, dtype, all_layers)
            except (DataError, ShapeError) as error:
                failed.append(f"{path.name}: {error}")
            if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                _write(output, vectors, task)
                written = time.monotonic()
    finally:
        if len(vectors) > before:
            _write(output, vectors, task)
    if failed:
        raise DataError(f"{len(failed)} of {len(files)} files were not embedded:\n" + "\n".join(failed))
    return len(vectors) - before


@torch.inference_mode()
def _embed(encoder: LongNetEncoder, path: Path, device: torch.device, dtype: torch.dtype, all_layers: bool) -> Tensor:
    features, coords = read_features(path)
    places = None if coords is None or encoder.config.position_embedding != "sincos" else coords[None].to(device)
    out = encoder(features=features[None].to(device, dtype), coords=places, hidden_states=all_layers)
    vectors = torch.cat(out.pooled_states) if all_layers else out.pooled[0]
    found: Tensor = vectors.float().cpu().clone()
    return found


def _done(output: Path, task: dict[str, str]) -> dict[str, Tensor]:
    """Return what a file holds already."""
    if not output.exists():
        return {}
    try:
        with safe_open(output, "pt") as file:
            found = file.metadata() or {}
            vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{output} is no file that longnet embed wrote: {error}; use another output") from None
    for name, value in task.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{output} was written with another {name} ({found.get(name)}, here {value}); use another output"
            )
    return vectors


def _write(output: Path, vectors: dict[str, Tensor], task: dict[str, str]) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_file(vectors, partial, task)
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise LongNetError(f"cannot write {output}: {error}") from None
