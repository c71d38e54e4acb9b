"""Decoding: one new row for each of several texts, whose sparse keys and values lie in tensors of constant shape.

A new row ``n`` of a causal text attends, in each branch whose grid has the row, to the kept rows of its own segment
that came before, and to itself. All branches share one softmax. So a layer keeps one row of slots for each key/value
head, ``Σ ceil(w/r)`` slots in all, branch after branch: kept row ``j`` of the present segment of branch ``b`` is slot
``first_b + j``. A new segment overwrites the slots of the one before it. Where every text stands is a tensor, so that
each has a row of its own and a step has the same shape whatever the rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_dist.attention.positions import Factors, Positions, RotaryTable, rotate
from longnet_dist.attention.stream import LayerCache, Stream
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import open_segments
from longnet_dist.numerics import wide_dtype

if TYPE_CHECKING:
    from longnet_dist.attention.kernels.triton.decode import VisibleBlocks


class Decoding:
    """Hold the cached rows of ``texts`` causal texts, and let a model compute the next row of each.

    It stands where :class:`~longnet_dist.Stream` does: ``model(ids, stream=decoding)`` takes ``ids (texts, 1)``, the
    tokens at :attr:`rows`; then :meth:`advance`.

    Args:
        patterns: the branches of each layer.
        texts: number of texts ``B``.
        max_rows: the most rows that a text can have.
        kv_heads: key/value heads ``Hkv``.
        head_dim: ``D``.
        dtype: of keys and values.
        device: of all tensors.
        positions: of queries and keys; None for none.

    Attributes:
        rows: ``(B,)`` int64, the row of each text that comes next.
        layers: the cache of each layer.
        split_keys: whether kernels of our own rotate queries and keys and keep the new rows and, in layers without
            sinks, split the keys of a head over the processors of a GPU.

    Raises:
        ConfigError: positions that cannot span ``max_rows``.
    """

    recording = False

    def __init__(
        self,
        patterns: Sequence[DilatedPattern],
        texts: int,
        max_rows: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        positions: Positions | None = None,
    ) -> None:
        self.max_rows, self.split_keys = max_rows, False
        self.rows = torch.zeros(texts, dtype=torch.int64, device=device)
        self._going_on = torch.zeros_like(self.rows)
        self._present: dict[DilatedPattern, Present] = {}
        self._blocks: dict[tuple[DilatedPattern, int], VisibleBlocks] = {}
        grids: dict[DilatedPattern, Grid] = {}
        for pattern in patterns:
            if pattern not in grids:
                grids[pattern] = Grid.of(pattern, max_rows, kv_heads, head_dim, dtype, device, positions)
        shape = texts, kv_heads, head_dim
        self.layers = [DecodingLayer(self, grids[pattern], shape, dtype, device) for pattern in patterns]

    def advance(self) -> None:
        """Let every text that was loaded go on to its next row."""
        self.rows += self._going_on
        self.forget_places()

    def forget_places(self) -> None:
        """Forget where the next rows lie, so that the next pass computes it."""
        self._present.clear()
        self._blocks.clear()

    def present(self, grid: Grid) -> Present:
        """Return where the next row of every text lies in a grid: once for all layers that have it."""
        if grid.pattern not in self._present:
            self._present[grid.pattern] = grid.at(self.rows)
        return self._present[grid.pattern]

    def blocks(self, grid: Grid, group: int, dim: int) -> VisibleBlocks:
        """Return the blocks of slots that ``group`` queries of ``dim`` channels see in a grid: once, too."""
        from longnet_dist.attention.kernels.triton.decode import block_size, visible_blocks

        key = grid.pattern, block_size(group, dim)
        if key not in self._blocks:
            self._blocks[key] = visible_blocks(self.present(grid).seen, key[1])
        return self._blocks[key]

    def clear(self, text: int) -> None:
        """Forget a text; its place computes row 0 until another is loaded."""
        self.rows[text] = self._going_on[text] = 0
        self.forget_places()

    def load(self, text: int, stream: Stream, row: int, item: int = 0) -> None:
        """Make batch item ``item`` of a stream, of which rows ``[0, row)`` have passed, the past of a text."""
        self.rows[text], self._going_on[text] = row, 1
        self.forget_places()
        carried = iter(stream.carried())
        for layer in self.layers:
            segments = open_segments(layer.grid.pattern, row, stream.total_rows)
            if segments:
                records = next(carried)[:, item]
                layer.load(text, [(s.branch, s.compact_rows) for s in segments], records)

    def copy(self, text: int, to: int) -> None:
        """Give text ``to`` the past of ``text``."""
        self.rows[to], self._going_on[to] = self.rows[text], self._going_on[text]
        self.forget_places()
        for layer in self.layers:
            layer.records[:, to] = layer.records[:, text]

    def reorder(self, texts: Tensor) -> None:
        """Let each place go on from the text of another; their number becomes that of ``texts``.

        Args:
            texts: int64, numbers of texts.
        """
        texts = texts.to(self.rows.device)
        self.rows, self._going_on = self.rows[texts], self._going_on[texts]
        self.forget_places()
        for layer in self.layers:
            layer.records = layer.records[:, texts]


class Present(NamedTuple):
    """Say where the next row of every text lies in a grid, and what it sees there.

    Attributes:
        slots: where its keys and values go, ``(branches, B, Hkv)`` int64; the last slot for branches that skip it.
        seen: the slots that a head's query sees, ``(B, Hkv, slots)`` bool; slot 0 where it sees nothing.
        nothing: whether it sees nothing, ``(B, Hkv, 1)`` bool.
        tables: rotations of queries and keys, ``(B, 1, D/2, 2)``; None without positions.
    """

    slots: Tensor
    seen: Tensor
    nothing: Tensor
    tables: RotaryTable | None


@dataclass(frozen=True)
class Grid:
    """A Grid says where the rows of a pattern's branches lie in a layer's slots.

    Attributes:
        pattern: the branches.
        first: first slot of each branch, and the number of all slots.
        lengths, rates, shifts: ``w``, ``r`` and shift of each branch, ``(branches, 1, 1)`` int64.
        offsets: offset of each head, ``(branches, 1, Hkv)`` int64.
        firsts: ``first`` without its last, ``(branches, 1, 1)`` int64.
        factors: constants of the positions; None without.
        span: see :meth:`Positions.span`.
        wide: dtype of the rotations.
    """

    pattern: DilatedPattern
    first: tuple[int, ...]
    lengths: Tensor
    rates: Tensor
    shifts: Tensor
    offsets: Tensor
    firsts: Tensor
    factors: Factors | None
    span: tuple[int, int]
    wide: torch.dtype

    @classmethod
    def of(
        cls,
        pattern: DilatedPattern,
        max_rows: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        positions: Positions | None,
    ) -> Grid:
        """Lay out the slots for texts of at most ``max_rows`` rows."""
        if positions is not None:
            positions.check(pattern, max_rows, head_dim, dtype)
        first = [0]
        for branch in pattern:
            first.append(first[-1] - (-min(branch.segment_length, max_rows) // branch.dilation_rate))

        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device).view(-1, 1, 1)

        offsets = [pattern.offsets(branch, kv_heads) for branch in pattern]
        return cls(
            pattern,
            tuple(first),
            column(pattern.segment_lengths),
            column(pattern.dilation_rates),
            column(pattern.shift),
            torch.tensor(offsets, dtype=torch.int64, device=device).unsqueeze(1),
            column(first[:-1]),
            None if positions is None else positions.factors(head_dim, device),
            (1, 0) if positions is None else positions.span(pattern, max_rows),
            wide_dtype(dtype),
        )

    def at(self, rows: Tensor) -> Present:
        """Return where rows ``(B,)``, int64, lie, one of each text."""
        row = rows.view(1, -1, 1)
        place = torch.where(row < self.shifts, row, (row - self.shifts) % self.lengths)
        behind = place - self.offsets
        kept, index = (behind >= 0) & (behind % self.rates == 0), behind // self.rates
        seen = self._seen(torch.where(kept, index + 1, 0))
        # A head that sees nothing would have no largest score; it sees slot 0, and its result is dropped.
        nothing = ~seen.any(-1, keepdim=True)
        seen[:, :, :1] |= nothing
        slots = torch.where(kept, self.firsts + index, self.first[-1])
        return Present(slots, seen, nothing, self._tables(rows))

    def _seen(self, counts: Tensor) -> Tensor:
        """Return the first ``counts (branches, B, Hkv)`` slots of each branch, ``(B, Hkv, slots)``."""
        slots = torch.arange(self.first[-1], device=counts.device)
        ranges = zip(self.first, self.first[1:], counts.unsqueeze(-1), strict=False)
        return torch.cat([slots[: stop - first] < count for first, stop, count in ranges], -1)

    def _tables(self, rows: Tensor) -> RotaryTable | None:
        if self.factors is None:
            return None
        n, (length, phase) = rows.view(-1, 1, 1), self.span
        tables = [table.to(self.wide) for table in self.factors.at(n, (n - phase) % length, length)]
        return RotaryTable(tables[0], tables[-1])


class DecodingLayer:
    """Keep the slots of a layer.

    Attributes:
        decoding: the texts, whose rows are those of all layers.
        grid: where rows lie.
        records: ``(2, B, Hkv, slots + 1, D)``, keys and values. The last slot takes what no branch keeps.
        runner: computes the layer's block from block, rows and this cache, as its modules do; None: they run.
    """

    def __init__(
        self, decoding: Decoding, grid: Grid, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        texts, kv_heads, head_dim = shape
        self.decoding, self.grid = decoding, grid
        self.runner: Callable[..., Tensor] | None = None
        self.records = torch.zeros(2, texts, kv_heads, grid.first[-1] + 1, head_dim, dtype=dtype, device=device)

    def load(self, text: int, segments: Sequence[tuple[int, int]], records: Tensor) -> None:
        """Fill the slots of a text from the compact records ``(2, slots, D)`` of its open segments.

        Args:
            text: number of the text.
            segments: branch and compact rows of each, in the order of the records.
            records: as :meth:`Stream.carried` returns them for one text.
        """
        kv_heads, begin = self.records.shape[2], 0
        for branch, compact_rows in segments:
            part = records[:, begin : begin + compact_rows * kv_heads]
            begin += compact_rows * kv_heads
            first, stop = self.grid.first[branch : branch + 2]
            kept = torch.unflatten(part, 1, (compact_rows, kv_heads)).transpose(1, 2)[:, :, : stop - first]
            self.records[:, text, :, first : first + kept.shape[2]] = kept

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
        """Keep the keys and values of the present rows, and return what their queries attend to.

        Queries and keys are rotated here, if there are positions.

        Args:
            q: ``(B, 1, H, D)``.
            k, v: ``(B, 1, Hkv, D)``.
            sink: ``(H,)``, the logarithm of the weight of one more key of value 0; None for none.

        Returns:
            ``(B, 1, H, D)``; 0 for heads whose row no branch keeps.
        """
        present = self.decoding.present(self.grid)
        q = self._rotate_and_keep(present, q, k, v)
        heads, seen = q.view(k.shape[0], k.shape[2], -1, q.shape[3]), present.seen.unsqueeze(2)
        if sink is None:
            keys, values = self.records[:, :, :, :-1]
            if self.decoding.split_keys:
                from longnet_dist.attention.kernels.triton.decode import attend_to_slots

                blocks = self.decoding.blocks(self.grid, *heads.shape[2:])
                return attend_to_slots(heads, keys, values, present.seen, present.nothing, blocks).view_as(q)
            out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=seen)
        else:
            # The last slot, which nobody reads, is the sink's key: its product is 0, and the mask adds its score.
            self.records[:, :, :, -1] = 0
            keys, values = self.records
            scores = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf).expand(*heads.shape[:3], -1)
            of_sink = sink.to(q.dtype).view(1, heads.shape[1], -1, 1).expand(*heads.shape[:3], 1)
            out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=torch.cat([scores, of_sink], -1))
        return out.masked_fill(present.nothing.unsqueeze(2), 0.0).view_as(q)

    def _rotate_and_keep(self, present: Present, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the rotated queries, and keep rotated keys and values in their slots."""
        if self.decoding.split_keys:
            from longnet_dist.attention.kernels.triton.keep import rotate_and_keep

            return rotate_and_keep(q, k, v, self.records, present.slots, present.tables)
        if present.tables is not None:
            q, k = (rows.unsqueeze(1) for rows in rotate(q[:, 0], k[:, 0], present.tables))
        texts, heads = (torch.arange(size, device=k.device) for size in present.slots.shape[1:])
        records = torch.stack([k, v])[:, :, 0].unsqueeze(1)  # (2, 1, B, Hkv, D)
        branches = len(present.slots)
        self.records[:, texts[:, None], heads, present.slots] = records.expand(2, branches, *records.shape[2:])
        return q


Cache = LayerCache | DecodingLayer
"""What a layer keeps of rows that came before: of a stream, or of texts that are decoded."""
