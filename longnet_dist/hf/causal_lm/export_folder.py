"""A trained LongNet as a folder that transformers loads, with its tokenizer where transformers has one like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longnet_dist.data.tokenizers import Tokenizer
from longnet_dist.errors import ConfigError
from longnet_dist.hf.causal_lm.modeling import LongNetForCausalLM
from longnet_dist.hf.finished_model import write_model_card
from longnet_dist.model.longnet import LongNet
from longnet_dist.model.pretrained import OWN_TOKENIZER_FILE, empty_folder

_SEPARATOR_BYTE = "\x00"


def save_for_transformers(model: LongNet, folder: Path, tokenizer: Tokenizer, context: int | None) -> str:
    """Write a model, in the precision it has, for ``AutoModelForCausalLM``, and its tokenizer for ``AutoTokenizer``.

    A tokenizer of tiktoken is not converted. Its name is written, as every tokenizer's description is.

    Args:
        model: causal, on one device, not sharded.
        folder: new, or empty.
        tokenizer: of the model's text. The token that separates documents becomes the end of a text.
        context: tokens of the sequences that it was trained on; None if that is not known.

    Returns:
        A sentence that says what was done with the tokenizer.

    Raises:
        ConfigError: a bidirectional model, or a folder that holds something or cannot be written.
    """
    wrapped = LongNetForCausalLM.of(model, max_position_embeddings=context, eos_token_id=tokenizer.document_separator)
    try:
        empty_folder(folder)
        wrapped.save_pretrained(folder)
        fields = tokenizer.to_json()
        (folder / OWN_TOKENIZER_FILE).write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
        converted = _converted(fields, tokenizer.document_separator)
        if converted is not None:
            converted.save_pretrained(folder)
        write_model_card(folder, context)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write the model to {folder}: {error}") from None
    if converted is None:
        return (
            f"AutoTokenizer cannot load {tokenizer.name}: take the ids from tiktoken itself, or give the folder to "
            f"longnet generate"
        )
    return f"AutoTokenizer loads the tokenizer {tokenizer.name}"


def _converted(fields: dict[str, Any], separator: int | None) -> PreTrainedTokenizerFast | None:
    """Return a tokenizer of transformers with the same ids; None for tiktoken."""
    if fields["kind"] == "tiktoken":
        return None
    backend = _bytes() if fields["kind"] == "bytes" else Backend.from_str(json.dumps(fields["content"]))
    eos = None if separator is None else backend.id_to_token(separator)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, clean_up_tokenization_spaces=False, padding_side="left"
    )


def _bytes() -> Backend:
    """Return a tokenizer whose ids are the bytes of a text: byte-level BPE without merges.

    Byte 0, which separates documents, is a token of its own. So it can be the end of a text, and no character of
    byte-level BPE's alphabet has to stand for it.
    """
    # The alphabet maps a byte that prints to itself, and the others, in their order, to characters from 256 on.
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in prints]
    vocabulary = {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}
    del vocabulary[chr(256)]
    backend = Backend(models.BPE(vocab={_SEPARATOR_BYTE: 0, **vocabulary}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend
