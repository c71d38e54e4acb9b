"""The identity of a run: what must stay the same between its starts and on all its ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

import longnet_dist
from longnet_dist.caches import bounded_cache
from longnet_dist.data.features.feature_set import FeatureSet
from longnet_dist.data.token_file import TokenFile

MODEL_FIELDS_FREE_TO_CHANGE = {"loss_chunk", "path"}  # memory and places only, not mathematics
# Places of files: the content behind them is compared instead.
_PLACES = {
    "model.path",
    "data.path",
    "data.cache_dir",
    "data.features",
    "data.labels",
    "data.validation_names",
    "train.output_dir",
    "train.compile_cache",
}
_NOT_OF_THE_RUN = {"train.resume", "train.init", "train.ignore_tokenizer", "train.ignore_plan"}  # of one start only
_SWITCHED_OFF = ("truncation", "padding")  # keys of a tokenizer.json
SHOWN_DIGITS = 12


class RunIdentity(BaseModel):
    """A RunIdentity is stored in each checkpoint, so a copied or trimmed folder still knows its run.

    Attributes:
        settings: the resolved configuration, by dotted key.
        tokenizer: SHA-256 of the tokenizer's JSON.
        data: the checksum of the tokens in the token file's header, and the edges of its splits. Of features, checksums
            of the list of files with their shapes, of the labels, and of the split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any]
    tokenizer: str
    data: dict[str, str]

    @classmethod
    def of(cls, resolved: Mapping[str, Any], token_file: TokenFile | FeatureSet) -> Self:
        """Return the identity of a run.

        Args:
            resolved: its configuration as nested JSON values, with what was ``auto`` filled in.
            token_file: its data.
        """
        if isinstance(token_file, FeatureSet):
            return cls(settings=dict(flat(resolved)), tokenizer="none", data=token_file.fingerprint())
        header = token_file.header
        splits = {"train": header.train, "validation": header.validation}
        edges = {name: f"tokens [{split.first}, {split.last})" for name, split in splits.items()}
        data = {"tokens": header.sha256, **edges}
        if header.answers:
            data["answers"] = header.answers.sha256
        return cls(settings=dict(flat(resolved)), tokenizer=digest_of_tokenizer(header.tokenizer), data=data)

    def refused(self, ours: RunIdentity) -> str | None:
        """Return the first difference with which a run cannot go on; None if there is none.

        Model, tokenizer, data, seed and sequence length must be those of the checkpoint.

        Args:
            ours: the identity of the run that is to go on from a checkpoint with this identity.
        """
        for what, there, here in (("tokenizer", self.tokenizer, ours.tokenizer), *_pairs(self.data, ours.data)):
            if there != here:
                what = what if what == "tokenizer" else f"data ({what})"
                return f"another {what}: {shown_checksum(there)} there and {shown_checksum(here)} here"
        for key, there, here in _pairs(self.settings, ours.settings):
            if there != here and _is_fixed(key):
                return f"another {key}: {there!r} there and {here!r} here"
        return None

    def changes(self, ours: RunIdentity) -> list[str]:
        """Return the allowed differences, each as ``key: old -> new``.

        Args:
            ours: the identity of the run that goes on from a checkpoint with this identity.
        """
        pairs = _pairs(self.settings, ours.settings)
        free = [pair for pair in pairs if pair[1] != pair[2] and not _is_fixed(pair[0])]
        return [f"{key}: {there} -> {here}" for key, there, here in free if key not in _NOT_OF_THE_RUN]

    def facts(self) -> dict[str, str]:
        """Return what must be equal on all ranks, by name; of files the content, not the place."""
        settings = {key: json.dumps(value) for key, value in self.settings.items() if key not in _PLACES}
        data = {f"data ({part})": value for part, value in self.data.items()}
        return {"tokenizer": self.tokenizer, **data, **settings}


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_of_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a tokenizer's JSON.

    One that travels with its content is that, under whatever file name. Its truncation and padding do not count, since
    they are switched off.
    """
    if "content" not in tokenizer:
        return digest_of(tokenizer)
    content = {key: None if key in _SWITCHED_OFF else value for key, value in tokenizer["content"].items()}
    return digest_of({key: value for key, value in tokenizer.items() if key != "name"} | {"content": content})


@bounded_cache(maxsize=1)
def code_versions() -> dict[str, str]:
    """Return the versions of what computes: this package with a checksum of its sources, torch, DeepSpeed."""
    sources = hashlib.sha256()
    root = Path(longnet_dist.__file__).parent
    for file in sorted(root.rglob("*.py")):
        sources.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    versions = {"longnet-dist": f"{longnet_dist.__version__} ({sources.hexdigest()[:SHOWN_DIGITS]})"}
    for name in ("torch", "deepspeed"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _is_fixed(key: str) -> bool:
    """Say whether a setting must stay what it was: model, sequence length, seed, and what else selects the samples."""
    section, _, name = key.partition(".")
    if section == "model":
        return name not in MODEL_FIELDS_FREE_TO_CHANGE
    return key == "train.seed" or (section == "data" and key not in _PLACES)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values by their places, such as ``train.steps``; ``deepspeed.extra`` stays one value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and prefix + name != "deepspeed.extra":
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _pairs(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the values of two mappings by key; a key that one of them lacks, as of another version, is left out."""
    return [(key, value, here[key]) for key, value in there.items() if key in here]


def shown_checksum(checksum: str) -> str:
    """Return the first digits of a SHA-256, for messages; other texts as they are."""
    return f"SHA-256 {checksum[:SHOWN_DIGITS]}…" if len(checksum) == hashlib.sha256().digest_size * 2 else checksum
