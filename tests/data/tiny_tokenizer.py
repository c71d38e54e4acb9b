"""The tests train a small byte-level BPE."""

from __future__ import annotations

from pathlib import Path

import pytest


def write_tiny_tokenizer(path: Path) -> Path:
    """Train a tokenizer.json of 300 tokens, with ``<|endoftext|>``, on this file itself."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    backend.save(str(path))
    return path
