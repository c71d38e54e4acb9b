"""Streams process a sequence chunk by chunk: they keep the rows that later chunks need, and the gradients of these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from longnet_dist.comm.transfer import CompactBuffers
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.chunks import chunks_of, recorded_segments
from longnet_dist.geometry.documents import Documents, as_integer, check_end, read_edges
from longnet_dist.geometry.pattern import DilatedPattern, check_pattern
from longnet_dist.geometry.window import Segment, Shards, open_segments
from longnet_dist.numerics import wide_dtype


class Stream:
    """Hold the state of a sequence of ``total_rows`` rows that passes through a model in chunks.

    Of all the past, a chunk needs only the sparse rows of the segments that are open where it begins. These are at most
    ``Σ_i ceil(w_i / r_i)`` rows a head and layer, however long the sequence is (``geometry.chunks.cache_rows``). Each
    layer keeps them in a :class:`LayerCache`. A training step keeps the rows of all segments, since backward visits the
    chunks in reverse.

    Args:
        pattern: the branches, or those of each layer.
        total_rows: ``N``.
        num_layers: layers that keep a cache.
        num_ranks: ranks of the sequence group, which share every chunk.
        rank: this rank's place in the group.
        causal: a bidirectional sequence can only pass as one chunk.
        cu_seqlens: edges of packed documents, the same for all batch items, in rows of the whole sequence, or a
            :class:`~longnet_dist.geometry.documents.Documents`; None: the sequence is one document.

    Attributes:
        shards: the present chunk and its slices.
        recording: whether the present chunk passes only to leave its rows for other chunks, so that the model may stop
            behind its last attention.

    Raises:
        ConfigError: numbers of rows, layers or ranks that cannot be, or another number of patterns than layers.
        ShapeError: edges that do not fit the sequence.
    """

    def __init__(
        self,
        pattern: DilatedPattern | Sequence[DilatedPattern],
        total_rows: int,
        num_layers: int,
        *,
        num_ranks: int = 1,
        rank: int = 0,
        causal: bool = True,
        cu_seqlens: Any = None,
    ) -> None:
        for name, number, least in (("total_rows", total_rows, 1), ("num_layers", num_layers, 0)):
            _check_number(name, number, least)
        _check_number("num_ranks", num_ranks, 1)
        _check_number("rank", rank, 0, num_ranks - 1)
        patterns = list(pattern) if isinstance(pattern, Sequence) else [pattern] * num_layers
        for own in patterns:
            check_pattern(own)
        if len(patterns) != num_layers:
            raise ConfigError(
                f"a stream needs one pattern, or one for each of {num_layers} layers, not {len(patterns)}"
            )
        self.total_rows, self.num_ranks, self.rank, self.causal = total_rows, num_ranks, rank, causal
        self.documents = _documents(cu_seqlens, total_rows)
        self.shards: Shards | None = None
        self.recorded = self.recording = self.replaying = False
        self.layers = [LayerCache(self, own) for own in patterns]
        self._next_row = 0

    def chunks(self, length: int, start: int = 0) -> list[Shards]:
        """Return the chunks of ``length`` rows from row ``start`` on, in order; the last holds what is left.

        Raises:
            ConfigError: a length under 1, or several chunks of a bidirectional sequence.
            ShapeError: a chunk too short to give every rank a row.
        """
        chunks = chunks_of(self.total_rows, length, self.num_ranks, start)
        if len(chunks) > 1 and not self.causal:
            raise ConfigError(
                f"rows of a bidirectional sequence see later ones, so its {self.total_rows} rows cannot pass in chunks "
                f"of {length}; use chunks of the whole sequence"
            )
        return chunks

    def forward(self, length: int) -> Iterator[Shards]:
        """Visit the chunks that are left, in order; the caller passes each through the model while it is present."""
        for shards in self.chunks(length, self._next_row):
            yield self.enter(shards)

    def prefill(self, stop: int, length: int) -> Iterator[Shards]:
        """Visit rows ``[0, stop)`` in chunks that only leave their rows for those behind."""
        yield from self._leave_rows(chunks_of(self.total_rows, length, self.num_ranks, 0, stop))

    def _leave_rows(self, chunks: Iterable[Shards]) -> Iterator[Shards]:
        self.recording = True
        for shards in chunks:
            yield self.enter(shards)
        self.recording = False

    def enter(self, shards: Shards) -> Shards:
        """Make ``shards`` the present chunk.

        Raises:
            ShapeError: it does not begin where the last chunk ended.
        """
        if not self.replaying and shards.start != self._next_row:
            raise ShapeError(f"the next chunk of the stream must begin at row {self._next_row}, not {shards.start}")
        self.shards, self._next_row = shards, shards.stop
        return shards

    def record(self, length: int) -> Iterator[Shards]:
        """Visit all chunks but the last, to keep the rows that :meth:`replay` needs; run them without graph."""
        chunks = self.chunks(length)
        self.recorded = True
        found: dict[DilatedPattern, tuple[Segment, ...]] = {}
        for layer in self.layers if len(chunks) > 1 else ():  # one chunk leaves nothing for others
            if layer.pattern not in found:
                kept = recorded_segments(layer.pattern, chunks, self.rank, self.causal, self.documents)
                found[layer.pattern] = kept
            layer.recorded = found[layer.pattern]
        yield from self._leave_rows(chunks[:-1])

    def replay(self, length: int) -> Iterator[Shards]:
        """Visit the chunks of a recorded stream in reverse; the caller runs forward and backward of each.

        Rows that a chunk shared with later ones receive the gradients that those sent. The last chunk comes first and
        was not recorded: its rows are exchanged now. So a sequence of one chunk is computed once.
        """
        if not self.recorded or self.recording:
            raise ConfigError("only a stream that was recorded can be replayed; pass it through Stream.record first")
        self.replaying = True
        for shards in reversed(self.chunks(length)):
            yield self.enter(shards)
        for layer in self.layers:
            layer.clear()

    def carried(self) -> list[Tensor]:
        """Return the records that each layer keeps of the open segments for later chunks, ``(2, B, slots, D)`` each.

        Layers without an open segment are left out. The records are the same on all ranks, and for any number of ranks.
        :meth:`resume` continues from them and the row.
        """
        return [layer.carried(segments) for layer, segments in self._open(self._next_row)]

    def resume(self, row: int, carried: list[Tensor]) -> None:
        """Let a fresh stream continue at ``row`` with what :meth:`carried` returned there.

        Raises:
            ConfigError: the row is not in the sequence.
            ShapeError: the records are not those of the open segments at ``row``.
        """
        _check_number("the row to go on at", row, 0, self.total_rows)
        self._next_row = row
        layers = self._open(row)
        if len(carried) != len(layers):
            number = len(layers[0][1]) if layers else 0
            raise ShapeError(
                f"{number} segments are open at row {row}, which {len(layers)} layers keep, "
                f"but rows of {len(carried)} layers came"
            )
        for (layer, segments), records in zip(layers, carried, strict=True):
            layer.resume(segments, records)

    def _open(self, row: int) -> list[tuple[LayerCache, tuple[Segment, ...]]]:
        """Return the layers with segments that are open at ``row``, and these."""
        found = ((x, open_segments(x.pattern, row, self.total_rows, self.documents)) for x in self.layers)
        return [(layer, segments) for layer, segments in found if segments]


def _check_number(name: str, number: object, least: int, most: int | None = None) -> None:
    """Raise ConfigError unless ``number`` is an integer from ``least`` to ``most``."""
    found = as_integer(number)
    if found is None or found < least or (most is not None and found > most):
        end = "" if most is None else f" and at most {most}"
        raise ConfigError(
            f"{name} of a stream must be an integer of at least {least}{end}, but is {number!r}; give one"
        )


def _documents(cu_seqlens: Any, total_rows: int) -> Documents | None:
    """Return the documents of a stream; its items must share them, since they share its chunks."""
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Documents):
        check_end(cu_seqlens.stops[-1], total_rows)
        return cu_seqlens
    lists = read_edges(cu_seqlens, 1, total_rows)
    return Documents.of_edges(lists[0])


class LayerCache:
    """Keep the sparse rows of a stream for one layer, and the gradients of those rows.

    Attributes:
        pattern: the branches of the layer.
        recorded: the segments of which a recorded stream keeps the rows of all chunks.
    """

    def __init__(self, stream: Stream, pattern: DilatedPattern) -> None:
        self.stream, self.pattern = stream, pattern
        self.recorded: tuple[Segment, ...] = ()
        self._rows: CompactBuffers | None = None
        self._gradients: CompactBuffers | None = None

    @property
    def complete(self) -> bool:
        """Say whether all rows of the present chunk are here: in a replay, for all but the last chunk."""
        shards = self.stream.shards
        return self.stream.replaying and shards is not None and shards.stop < shards.total_rows

    def rows(self, segments: tuple[Segment, ...], k: Tensor) -> CompactBuffers:
        """Return buffers for the ``segments`` of the present chunk, with the records that earlier chunks left."""
        if self._rows is None:
            self._rows = CompactBuffers(self.recorded, k.shape[2], k, k.dtype)
        if not self.recorded:
            self._rows.set_segments(segments)
        return self._rows

    def gradients(self, segments: tuple[Segment, ...], k: Tensor) -> CompactBuffers:
        """Return buffers for the gradients of ``segments``, with the sums that later chunks left."""
        if self._gradients is None:
            self._gradients = CompactBuffers((), k.shape[2], k, wide_dtype(k.dtype))
        self._gradients.set_segments(segments)
        return self._gradients

    def carried(self, segments: tuple[Segment, ...]) -> Tensor:
        """Return the records of ``segments``, of which some chunk left rows here."""
        assert self._rows is not None
        self._rows.set_segments(segments)
        return self._rows.records

    def resume(self, segments: tuple[Segment, ...], records: Tensor) -> None:
        """Take the ``records`` of ``segments`` as what earlier chunks left."""
        self._rows = CompactBuffers.of(segments, records)

    def clear(self) -> None:
        """Free the memory."""
        self._rows = self._gradients = None
