"""Tokenizers turn text into ids and back; each can be rebuilt from the JSON in a token file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from longnet_dist.errors import ConfigError, DataError

Ids = npt.NDArray[np.integer[Any]]

PIECE_BYTES = 1 << 18
# Published vocabularies have one of these tokens for the end of a document; the first one present is used.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # with a byte fallback, the token of one byte
INSTALL = "install it with: pip install 'longnet-dist[tokenizers]'"


class Tokenizer(Protocol):
    """A Tokenizer turns bytes of text into ids and back.

    Attributes:
        name: name for messages, as on the command line.
        vocab_size: upper bound (exclusive) of the ids.
        document_separator: id that is written between two documents; None if the vocabulary has no such token.
        text_only: the tokenizer needs UTF-8; other bytes are read as U+FFFD.
    """

    name: str
    vocab_size: int
    document_separator: int | None
    text_only: bool

    def encode(self, text: bytes) -> Ids:
        """Return the ids of ``text``, (num_tokens,); text that looks like a special token is encoded as text."""

    def decode(self, ids: Sequence[int] | Ids) -> bytes:
        """Return the text of ``ids``.

        Raises:
            DataError: an id is outside of the vocabulary.
        """

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the bytes of text that each id stands for, (vocab_size,); a separator counts 1, an unused id 0."""

    def to_json(self) -> dict[str, Any]:
        """Return what :func:`tokenizer_from_json` needs to rebuild the tokenizer, if possible without other files."""


class ByteTokenizer:
    """A ByteTokenizer uses every byte as its own id; byte 0, which text does not contain, separates documents."""

    name = "bytes"
    vocab_size = 256
    document_separator: int | None = 0
    text_only = False

    def encode(self, text: bytes) -> Ids:
        """Return the bytes of ``text`` as ids, (num_bytes,) uint8."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: Sequence[int] | Ids) -> bytes:
        """Return ``ids`` as bytes."""
        return _checked(ids, self.vocab_size, self.name).astype(np.uint8).tobytes()

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return 1 for every id."""
        return np.ones(self.vocab_size, np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return the kind, which is all that is needed."""
        return {"kind": "bytes"}


class HuggingFaceTokenizer:
    """A HuggingFaceTokenizer uses a ``tokenizer.json`` of the ``tokenizers`` library, which the token file contains.

    Args:
        content: the parsed ``tokenizer.json``. Its truncation and padding are switched off, since they change the text.
        name: name for messages.

    Raises:
        DataError: the package is not installed, or the content is no tokenizer.
    """

    text_only = True

    def __init__(self, content: dict[str, Any], name: str) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise DataError(f"the tokenizer {name} needs the package tokenizers; {INSTALL}") from error
        try:
            self._backend = Backend.from_str(json.dumps(content))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{name} is not a tokenizer.json of Hugging Face tokenizers: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "</s>" in a text is four characters, not the end of a document
        self._content = content
        self.name = name
        self._vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        vocabulary = self._vocabulary
        if not vocabulary:
            raise DataError(f"the tokenizer {name} has an empty vocabulary; train it first")
        self.vocab_size = max(vocabulary.values()) + 1
        self.document_separator = next((vocabulary[text] for text in SEPARATORS if text in vocabulary), None)

    def encode(self, text: bytes) -> Ids:
        """Return the ids of ``text``, (num_tokens,) uint32."""
        # The "fast" call does not compute character offsets and takes half the time; it exists for batches only.
        try:
            [encoding] = self._backend.encode_batch_fast(
                [text.decode("utf-8", errors="replace")], add_special_tokens=False
            )
        except Exception as error:  # such as a text with an unknown word, without a token for those
            raise DataError(
                f"the tokenizer {self.name} cannot encode a text: {error}; use another tokenizer"
            ) from error
        return np.array(encoding.ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int] | Ids) -> bytes:
        """Return the text of ``ids`` as UTF-8, with special tokens as they are written."""
        known = _checked(ids, self.vocab_size, self.name).tolist()
        text: str = self._backend.decode(known, skip_special_tokens=False)
        return text.encode("utf-8", errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the bytes that each id adds to a text, (vocab_size,)."""
        texts, ids = list(self._vocabulary), list(self._vocabulary.values())
        sizes = np.zeros(self.vocab_size, np.int64)
        decoder = json.dumps(self._content.get("decoder"))
        if '"ByteLevel"' in decoder:
            from tokenizers.pre_tokenizers import ByteLevel

            alphabet = set(ByteLevel.alphabet())  # a character of it stands for one byte
            sizes[ids] = [len(text) if alphabet.issuperset(text) else len(text.encode()) for text in texts]
        elif decoder == "null":
            sizes[ids] = [len(text.encode()) for text in texts]
        else:
            # A decoder treats the first token in its own way, so each id is decoded behind another one.
            anchor = next((number for text, number in self._vocabulary.items() if text.isalnum()), ids[0])
            (alone,) = self._backend.decode_batch([[anchor]], skip_special_tokens=False)
            pairs = self._backend.decode_batch([[anchor, number] for number in ids], skip_special_tokens=False)
            sizes[ids] = [max(0, len(pair.encode()) - len(alone.encode())) for pair in pairs]
            if '"ByteFallback"' in decoder:
                sizes[[number for text, number in self._vocabulary.items() if _BYTE_TOKEN.fullmatch(text)]] = 1
        if self.document_separator is not None:
            sizes[self.document_separator] = 1
        return sizes

    def to_json(self) -> dict[str, Any]:
        """Return the kind, the name and the whole ``tokenizer.json``."""
        return {"kind": "huggingface", "name": self.name, "content": self._content}


class TiktokenTokenizer:
    """A TiktokenTokenizer uses an encoding of ``tiktoken``, such as ``gpt2`` or ``o200k_base``.

    tiktoken downloads an encoding at its first use, unless it is in the folder ``TIKTOKEN_CACHE_DIR``.

    Args:
        encoding: name of the encoding.

    Raises:
        DataError: the package is not installed, the encoding is unknown, or it cannot be downloaded.
    """

    text_only = True

    def __init__(self, encoding: str) -> None:
        self.name = f"tiktoken:{encoding}"
        try:
            import tiktoken
        except ImportError as error:
            raise DataError(f"the tokenizer {self.name} needs the package tiktoken; {INSTALL}") from error
        try:
            self._backend = tiktoken.get_encoding(encoding)
        except ValueError as error:
            known = ", ".join(tiktoken.list_encoding_names())
            raise DataError(f"tiktoken has no encoding {encoding!r}; it has {known}") from error
        except OSError as error:
            raise DataError(
                f"tiktoken could not download the encoding {encoding!r} ({type(error).__name__}); connect once, or set "
                "TIKTOKEN_CACHE_DIR to a folder that holds it"
            ) from error
        self.vocab_size = self._backend.n_vocab
        special = self._backend.special_tokens_set
        self.document_separator = self._backend.eot_token if "<|endoftext|>" in special else None

    def encode(self, text: bytes) -> Ids:
        """Return the ids of ``text``, (num_tokens,) uint32."""
        ids: Ids = self._backend.encode_to_numpy(text.decode("utf-8", errors="replace"), disallowed_special=())
        return ids

    def decode(self, ids: Sequence[int] | Ids) -> bytes:
        """Return the bytes of ``ids``."""
        known = _checked(ids, self.vocab_size, self.name).tolist()
        try:
            text: bytes = self._backend.decode_bytes(known)
        except KeyError as error:
            raise DataError(f"the tokenizer {self.name} has no token of id {error}") from error
        return text

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the length of each token, (vocab_size,)."""
        sizes = np.zeros(self.vocab_size, np.int64)
        for number in range(self.vocab_size):
            with contextlib.suppress(KeyError):  # some ids between the special tokens are unused
                sizes[number] = len(self._backend.decode_single_token_bytes(number))
        if self.document_separator is not None:
            sizes[self.document_separator] = 1
        return sizes

    def to_json(self) -> dict[str, Any]:
        """Return the kind and the name of the encoding."""
        return {"kind": "tiktoken", "encoding": self._backend.name}


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer that ``spec`` names: ``bytes``, ``tiktoken:NAME`` or the path of a ``tokenizer.json``.

    Raises:
        DataError: an unknown name, an unreadable file, or a package that is not installed.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("tiktoken:"):
        return TiktokenTokenizer(spec.removeprefix("tiktoken:"))
    path = Path(spec)
    if not path.is_file():
        raise DataError(
            f"a tokenizer is 'bytes', 'tiktoken:NAME' or the path of a tokenizer.json, but there is no file {spec!r}"
        )
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{spec} is not a readable tokenizer.json: {error}") from error
    return HuggingFaceTokenizer(content, path.name)


def tokenizer_from_json(fields: dict[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer from the result of :meth:`Tokenizer.to_json`.

    Raises:
        DataError: the fields are not those of a known kind.
    """
    match fields:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "huggingface", "content": dict(content), "name": str(name)}:
            return HuggingFaceTokenizer(content, name)
        case {"kind": "tiktoken", "encoding": str(encoding)}:
            return TiktokenTokenizer(encoding)
    raise DataError(
        f"a tokenizer's kind must be bytes, huggingface or tiktoken, with its fields, not {fields.get('kind')!r} with "
        f"{sorted(fields)}; prepare the token file again"
    )


def encode_prompt(tokenizer: Tokenizer, prompt: bytes, vocab_size: int) -> list[int]:
    """Return the ids of a prompt for a model.

    Args:
        tokenizer: that of the model.
        prompt: the text.
        vocab_size: vocabulary size of the model.

    Raises:
        ConfigError: the prompt is empty.
        DataError: the prompt has no token, or one that the model does not have.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    ids: list[int] = [int(number) for number in tokenizer.encode(prompt)]
    shown = repr(prompt[:40].decode("utf-8", errors="replace"))
    if not ids:
        raise DataError(f"the prompt {shown} has no token of the tokenizer {tokenizer.name}; give another prompt")
    if max(ids) >= vocab_size:
        raise DataError(
            f"the prompt {shown} has the token id {max(ids)} of the tokenizer {tokenizer.name}, but the model's "
            f"vocabulary ends at {vocab_size - 1}; give another prompt, or train with model.vocab_size="
            f"{tokenizer.vocab_size}"
        )
    return ids


def ids_with_text(tokenizer: Tokenizer, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Say of each id of a model's vocabulary whether it stands for a text, (vocab_size,).

    Raises:
        DataError: none does.
    """
    found = np.zeros(vocab_size, bool)
    known = tokenizer.token_bytes()[:vocab_size] > 0
    found[: len(known)] = known
    if not found.any():
        raise DataError(f"no id below {vocab_size} of the tokenizer {tokenizer.name} stands for a text; use another")
    return found


def split_at_lines(chunks: Iterable[bytes], limit: int = PIECE_BYTES) -> Iterator[bytes]:
    """Join the chunks of a document and cut it into pieces of at most ``limit`` bytes, without loading it whole.

    A piece ends after the last line end within the limit, or in a longer line before the last space, or without a space
    between two UTF-8 characters. Bytes as tokens are not affected by the cuts. A BPE may merge the few tokens next to a
    cut differently, once in ``limit`` bytes.

    Args:
        chunks: the document as bytes, in chunks of any size.
        limit: largest size of a piece, bytes.
    """
    rest = b""
    for chunk in chunks:
        rest += chunk
        while len(rest) > limit:
            cut = _last_cut(rest, limit)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_cut(text: bytes, limit: int) -> int:
    if line_end := text.rfind(b"\n", 0, limit) + 1:
        return line_end
    if (space := text.rfind(b" ", 1, limit)) > 0:
        return space
    # At most three continuation bytes (10xxxxxx) follow the first byte of a UTF-8 character.
    return next((cut for cut in range(limit, max(limit - 4, 0), -1) if text[cut] & 0xC0 != 0x80), limit)


def _checked(ids: Sequence[int] | Ids, vocab_size: int, name: str) -> npt.NDArray[np.int64]:
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        raise DataError(
            f"an id of the tokenizer {name} lies in [0, {vocab_size}), not {array[outside][0]}; "
            "use the tokenizer that the ids were made with"
        )
    return array
