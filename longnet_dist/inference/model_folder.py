"""A trained model in a folder of its own: what ``longnet export`` wrote, or a decoder of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longnet_dist.checkpoint.format import STATE_FILE, sha256_of
from longnet_dist.checkpoint.initial_weights import InitialWeights
from longnet_dist.checkpoint.run_model import new_model
from longnet_dist.config.hf_model import FAMILIES, PATTERN_FIELD, HuggingFaceConfig, read_model_config
from longnet_dist.config.model import HF_MODEL_TYPE, LongNetConfig
from longnet_dist.data.tokenizers import Tokenizer, load_tokenizer
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.geometry.masked_pattern import ALL_ROWS
from longnet_dist.model.longnet import LongNet
from longnet_dist.model.pretrained import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, from_pretrained, tokenizer_of


@dataclass(frozen=True)
class ModelFolder:
    """A ModelFolder is a language model that needs no run.

    Attributes:
        path: the folder.
        config: of the model. A decoder of transformers without a pattern has full attention, as in transformers.
        weights: of a decoder of transformers; None for a LongNet.
    """

    path: Path
    config: LongNetConfig
    weights: InitialWeights | None

    @staticmethod
    def is_at(path: Path) -> bool:
        """Say whether ``path`` is such a folder, and no run or checkpoint.

        Raises:
            CheckpointError: there is nothing.
        """
        if not path.exists():
            raise CheckpointError(
                f"there is no {path}; give the folder of a run, one of its checkpoints, or the folder of a model. "
                f"Nothing is downloaded: for a model of the Hub, hf download NAME --local-dir FOLDER"
            )
        return (path / CONFIG_FILE).is_file() and not (path / STATE_FILE).is_file()

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Read the configuration, and check that the weights are there and fit.

        Raises:
            ConfigError: no language model, or one that longnet_dist does not have.
            CheckpointError: a file is missing, damaged, or of another model.
        """
        family = read_model_config(path).get("model_type")
        if family in FAMILIES:
            return cls._of_transformers(path)
        if family not in (None, HF_MODEL_TYPE):
            raise ConfigError(
                f"{path} is a model of transformers with model_type={family!r}, but longnet reads those with "
                f"{', '.join(FAMILIES)} and its own; use it in Python after import longnet_dist.hf, or score it with "
                f"python -m longnet_dist.inference.harness.command run --model hf --model_args pretrained={path}"
            )
        return cls(path, _language_model(path, torch.device("cpu")).config, None)

    @classmethod
    def _of_transformers(cls, path: Path) -> ModelFolder:
        given: dict[str, Any] = {"path": path}
        if PATTERN_FIELD not in read_model_config(path):
            given |= {"segment_lengths": (ALL_ROWS,), "dilation_rates": (1,)}
        config = HuggingFaceConfig(**given)
        weights = InitialWeights.of_model(config, begins=True)
        if weights is None:
            raise CheckpointError(
                f"{path} has a {CONFIG_FILE}, but no *.safetensors with weights; give a trained model"
            )
        return cls(path, config, weights)

    @property
    def sha256(self) -> dict[str, str]:
        """Return the checksum of the weights."""
        return {WEIGHTS_FILE: self.weights.sha256 if self.weights else sha256_of(self.path / WEIGHTS_FILE)}

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            CheckpointError: the folder has none.
            DataError: a description that is not understood.
        """
        if self.weights is None:
            return tokenizer_of(self.path)
        if not (self.path / TOKENIZER_FILE).is_file():
            raise CheckpointError(
                f"{self.path} has no {TOKENIZER_FILE}, which longnet reads; write it in Python, MODEL being "
                f"what it was trained from: AutoTokenizer.from_pretrained(MODEL).save_pretrained({str(self.path)!r})"
            )
        return load_tokenizer(str(self.path / TOKENIZER_FILE))

    def load(self, device: torch.device) -> LongNet:
        """Return the model on a device, in evaluation mode and the dtype in which it is stored."""
        if self.weights is None or not isinstance(self.config, HuggingFaceConfig):
            return _language_model(self.path, device)
        model: LongNet = new_model(self.config)
        self.weights.load(model)
        return model.to(device, self.config.transformers.dtype or torch.float32).eval()


def _language_model(path: Path, device: torch.device) -> LongNet:
    """Load an exported model, and refuse others than language models."""
    model = from_pretrained(path, device)
    if isinstance(model, LongNet):
        return model
    config = model.config
    what, remedy = "an encoder of features, which has no text", "use longnet embed, or of a classifier longnet predict"
    if config.vocab_size is not None:
        what = f"a model of another program, for {config.vocab_size} ids of a tokenizer that longnet_dist does not have"
        remedy = "load it with longnet_dist.model.pretrained.from_pretrained and call it with tokens"
    raise ConfigError(f"{path} is {what}; {remedy}")
