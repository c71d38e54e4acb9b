"""A byte-level BPE is trained on a corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from longnet_dist.data.corpus import Corpus
from longnet_dist.data.tokenizers import SEPARATORS, HuggingFaceTokenizer, split_at_lines
from longnet_dist.errors import DataError
from longnet_dist.extras import require_extra

BYTES = 256
LARGEST = 2**20  # the trainer reserves memory for all tokens at its start


def train_tokenizer(corpus: Corpus, vocab_size: int) -> HuggingFaceTokenizer:
    """Train a byte-level BPE, which encodes any text without loss.

    The vocabulary has the 256 bytes, a separator of documents, and merges. It depends on the texts alone.

    Args:
        corpus: the texts, which are read once here.
        vocab_size: size of the vocabulary; it gets smaller if the texts have fewer words.

    Raises:
        DataError: the size leaves no merge or is too large, the corpus cannot be read twice, or it has no text.
        MissingExtraError: the package tokenizers is not installed.
    """
    require_extra("tokenizers", "--train-tokenizer", only="tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not BYTES + 1 < vocab_size <= LARGEST:
        raise DataError(
            f"a byte-level BPE has 256 bytes, a separator and merges, so its size must be above {BYTES + 1}, and it is "
            f"{LARGEST} at most, not {vocab_size}; 16384 is usual"
        )
    if not corpus.repeatable:
        raise DataError(
            "--train-tokenizer reads the text twice, which standard input and pipes do not allow; give a file, or "
            "train on a sample and use --tokenizer"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(replace(corpus)), trainer)
    return HuggingFaceTokenizer(json.loads(backend.to_str()), f"bpe-{vocab_size}")


def _texts(corpus: Corpus) -> Iterator[str]:
    """Yield the texts in pieces, with a progress bar over the bytes on disk."""
    with tqdm(total=corpus.total_bytes, unit="B", unit_scale=True, desc="train tokenizer") as progress:
        for document in corpus:
            for piece in split_at_lines(document.chunks):
                yield piece.decode("utf-8", errors="replace")
                progress.update(corpus.bytes_read - progress.n)
        progress.update(corpus.bytes_read - progress.n)
