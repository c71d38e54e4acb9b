"""A trained decoder is written back as a folder of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from longnet_dist.errors import ConfigError
from longnet_dist.hf.decoder.streamed_decoder import StreamedDecoder
from longnet_dist.hf.dilation import dilate
from longnet_dist.hf.finished_model import set_trained_length, write_model_card
from longnet_dist.model.pretrained import empty_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def export_decoder(
    model: StreamedDecoder, output: Path, tokenizer: dict[str, Any], length: int, dtype: torch.dtype | None = None
) -> None:
    """Write a decoder for ``from_pretrained``: config.json with its pattern, weights, tokenizer, and a model card.

    The files of the tokenizer are those in ``model.path``; if that folder is gone, the run's ``tokenizer.json``, unless
    the run reads bytes.

    Args:
        model: trained, on one device, with float32 weights; it is not usable any more.
        output: new, or empty.
        tokenizer: the JSON of the run's tokenizer.
        length: tokens of a sample in training.
        dtype: of the weights; None: that of config.json, or float32 if it has none.

    Raises:
        ConfigError: the folder holds something, or cannot be written.
    """
    chosen = dtype or model.config.transformers.dtype or torch.float32
    try:
        empty_folder(output)
        whole: PreTrainedModel = dilate(model.transformers_model.to(chosen), model.config.pattern)
        set_trained_length(whole, length)
        whole.eval().save_pretrained(output)
        _write_tokenizer(model.config.path, output, tokenizer)
        write_model_card(output, length)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write the model to {output}: {error}") from None


def _write_tokenizer(source: Path | None, output: Path, tokenizer: dict[str, Any]) -> None:
    """Copy the files of a tokenizer from the source's folder, or write the run's."""
    folder = None if source is None else source.expanduser()
    folder = folder.parent if folder is not None and folder.is_file() else folder
    found = [] if folder is None else [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for file in found:
        shutil.copyfile(file, output / file.name)
    if not found and "content" in tokenizer:
        content = json.dumps(tokenizer["content"], ensure_ascii=False)
        (output / TOKENIZER_FILES[0]).write_text(content, encoding="utf-8")
