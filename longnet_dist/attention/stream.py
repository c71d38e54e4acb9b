"""A sequence processed chunk by chunk: what later chunks need of earlier ones, and what they send back."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from longnet_dist.comm.exchange import CompactBuffers
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.exchange import held_segments
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Segment, Shards
from longnet_dist.kernels.contract import wide_dtype


class Stream:
    """The state of a causal sequence of ``total_rows`` rows that passes through a model in chunks.

    A chunk needs, of all the past, only the sparse rows of the segments that are open where it begins: at most
    ``Σ_i ceil(w_i / r_i)`` rows a head and layer, however long the sequence is. Each layer keeps them in a
    :class:`LayerCache`. A training step keeps the rows of all segments, since backward visits the chunks in reverse.

    Args:
        pattern: the branches.
        total_rows: ``N``.
        num_layers: layers that keep a cache.
        num_ranks: ranks of the sequence group, which share every chunk.
        rank: this rank's place in the group.

    Attributes:
        shards: the present chunk and its slices.
    """

    def __init__(
        self, pattern: DilatedPattern, total_rows: int, num_layers: int, *, num_ranks: int = 1, rank: int = 0
    ) -> None:
        self.pattern, self.total_rows, self.num_ranks, self.rank = pattern, total_rows, num_ranks, rank
        self.shards: Shards | None = None
        self.recorded: tuple[Segment, ...] | None = None
        self.replaying = False
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    def chunks(self, length: int) -> list[Shards]:
        """The chunks of ``length`` rows, in order; the last holds what is left.

        Raises:
            ConfigError: a length under 1.
            ShapeError: a chunk too short to give every rank a row.
        """
        if length < 1:
            raise ConfigError(f"the chunk length must be at least 1 row, not {length}")
        stops = [*range(length, self.total_rows, length), self.total_rows]
        starts = [0, *stops[:-1]]
        return [Shards.even(self.total_rows, self.num_ranks, *edges) for edges in zip(starts, stops, strict=True)]

    def forward(self, length: int) -> Iterator[Shards]:
        """Visit the chunks in order; the caller passes each through the model while it is the present one."""
        for shards in self.chunks(length):
            yield self.enter(shards)

    def enter(self, shards: Shards) -> Shards:
        """Make ``shards`` the present chunk.

        Raises:
            ShapeError: it does not begin where the last chunk ended.
        """
        expected = 0 if self.shards is None else self.shards.stop
        if not self.replaying and shards.start != expected:
            raise ShapeError(f"the next chunk of the stream must begin at row {expected}, not {shards.start}")
        self.shards = shards
        return shards

    def record(self, length: int) -> Iterator[Shards]:
        """As :meth:`forward`, but keep the rows of all segments, for :meth:`replay`."""
        held: dict[tuple[int, int], Segment] = {}
        for shards in self.chunks(length):
            for segment in held_segments(self.pattern, shards, self.rank, causal=True):
                key = segment.branch, segment.index
                if key not in held or held[key].stop < segment.stop:
                    held[key] = segment
        self.recorded = tuple(held[key] for key in sorted(held))
        yield from self.forward(length)

    def replay(self, length: int) -> Iterator[Shards]:
        """Visit the chunks of a recorded stream in reverse; the caller runs forward and backward of each.

        Rows that a chunk shared with later ones receive the gradients that those sent.
        """
        if self.recorded is None:
            raise ConfigError("only a stream that was recorded can be replayed; pass it through Stream.record first")
        self.replaying = True
        for shards in reversed(self.chunks(length)):
            yield self.enter(shards)
        for layer in self.layers:
            layer.clear()


class LayerCache:
    """The sparse rows that one layer keeps of a stream, and the gradients of those rows."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._rows: CompactBuffers | None = None
        self._gradients: CompactBuffers | None = None

    @property
    def complete(self) -> bool:
        """Whether all rows of the present chunk are already here, as in a replay."""
        return self.stream.replaying

    def rows(self, segments: tuple[Segment, ...], k: Tensor) -> CompactBuffers:
        """Buffers with room for the ``segments`` of the present chunk, holding what earlier chunks left."""
        if self._rows is None:
            self._rows = CompactBuffers(self.stream.recorded or (), k.shape[2], k, k.dtype)
        if self.stream.recorded is None:
            self._rows.hold(segments)
        return self._rows

    def gradients(self, segments: tuple[Segment, ...], k: Tensor) -> CompactBuffers:
        """Buffers for the gradients of ``segments``, holding what later chunks sent."""
        if self._gradients is None:
            self._gradients = CompactBuffers((), k.shape[2], k, wide_dtype(k.dtype))
        self._gradients.hold(segments)
        return self._gradients

    def clear(self) -> None:
        """Give the memory back."""
        self._rows = self._gradients = None
