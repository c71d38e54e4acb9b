"""Dilated attention written to be read: the oracle, and the kernel contract in plain tensor algebra.

Both hold whole score matrices. Every other backend is compared with them, on any device and in any dtype. The symbols
are those of :mod:`longnet_dist.attention.kernels.contract`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longnet_dist.attention.kernels.contract import BackwardInputs, Call, Gradients, SoftmaxStatistics, WideAccumulation
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.numerics import wide_dtype


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    *,
    causal: bool = True,
    scale: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dilated attention from its definition: one softmax over the multiset union of all branches' keys.

    A key that a query sees in ``c`` branches counts ``c`` times:
    ``O_i = Σ_j c_ij exp(s_ij) v_j / (Σ_j c_ij exp(s_ij) + exp(σ_i))`` with ``s = scale · q kᵀ``. It costs ``O(N²)``;
    autograd gives the gradients.

    Args:
        q: ``(B, N, H, D)``.
        k: ``(B, N, Hkv, D)``, as ``v``.
        pattern: the branches.
        causal: whether a row sees only itself and earlier rows.
        scale: factor of the scores, ``D ** -0.5`` if not given.
        sink: ``σ``, ``(H,)``, ``(N, H)`` or ``(B, N, H)``: the logarithm of the weight of one more key of value 0.

    Returns:
        out ``(B, N, H, D)`` and lse ``(B, N, H)``; 0 and ``-inf`` for a (row, head) without a key or sink.
    """
    rows, heads, dim = q.shape[1:]
    group = heads // k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    # c_ij for each query head: the heads of a group share the rows of their key/value head.
    count = attended_counts(pattern, rows, k.shape[2], causal).to(q.device).repeat_interleave(group, dim=0)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    # c·exp(s) = exp(s + ln c): a key with multiplicity c. ln 0 = -inf hides a key that no branch holds.
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale + count.to(q.dtype).log()
    if sink is not None:  # one more key with score σ_i and value 0
        column = sink.to(q.dtype).expand(q.shape[0], rows, heads).transpose(1, 2)[..., None]
        scores, v = torch.cat([scores, column], -1), torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 1))
    covered = (scores > -torch.inf).any(-1)
    scores = scores.masked_fill(~covered[..., None], 0.0)  # a softmax over nothing has no gradient, not a NaN
    lse = scores.logsumexp(-1)  # LSE_i = ln(Σ_j c_ij exp(s_ij) + exp(σ_i))
    # P_ij = c_ij exp(s_ij - LSE_i), whose rows sum to 1, and O = P V.
    weights = (scores - lse[..., None]).exp() * covered[..., None]
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse.masked_fill(~covered, -torch.inf).transpose(1, 2)


def attended_counts(pattern: DilatedPattern, rows: int, kv_heads: int, causal: bool) -> Tensor:
    """Count the branches in which query ``i`` of head ``h`` sees key ``j``: integers ``(Hkv, N, N)``."""
    row = torch.arange(rows)
    count = torch.zeros(kv_heads, rows, rows, dtype=torch.int64)
    for branch in pattern:
        # The grid begins at the shift; rows before it are a segment of their own, which counts from 0.
        behind = row - branch.shift
        segment = torch.where(behind < 0, -1, behind // branch.segment_length)
        position = torch.where(behind < 0, row, behind % branch.segment_length)
        for head, offset in enumerate(pattern.offsets(branch, kv_heads)):
            # LongNet, section 2.2: rows of a segment at distance r from each other attend to each other.
            kept = position % branch.dilation_rate == offset
            count[head] += (segment[:, None] == segment) & kept[:, None] & kept
    return count.tril() if causal else count


class ReferenceKernel(WideAccumulation):
    """Compute the contract's algebra for one (segment, head) after the other, with whole score matrices."""

    name = "reference"

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the keys of the piece into the running ``(out, lse)``."""
        for queries, keys, hidden in _blocks(call, q.shape[2]):
            scores = self._scores(call, q[queries], k[keys], hidden)
            piece_lse = scores.logsumexp(-1)  # LSE' = ln Σ_j exp(s_ij) over the keys of the piece
            # LSE'' = ln(exp LSE + exp LSE'): one softmax over the keys so far and these.
            merged = torch.logaddexp(lse[queries], piece_lse)
            # exp(LSE' - LSE'') O' = Σ_j exp(s_ij - LSE'') v_j.
            piece_out = (scores - merged[..., None]).exp() @ v[keys].to(scores.dtype)
            # O'' = exp(LSE - LSE'') O + exp(LSE' - LSE'') O'.
            out[queries] = out[queries] * (lse[queries] - merged).exp()[..., None] + piece_out
            lse[queries] = merged

    def start_backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        scratch: Tensor | None = None,
        delta: Tensor | None = None,
        dlse: Tensor | None = None,
    ) -> SoftmaxStatistics:
        """Clear ``dq``; return ``lse`` and ``delta``."""
        dq.zero_()
        # delta_i = dO_i·O_i = Σ_j P_ij (dO_i·v_j) over the keys of all branches, as O is merged. If LSE has a gradient
        # too, the caller gives delta_i = dO_i·O_i - dLSE_i.
        return lse, (dout.to(dq.dtype) * out.to(dq.dtype)).sum(-1) if delta is None else delta

    def backward(self, call: Call, given: BackwardInputs, sums: Gradients) -> None:
        """Add the piece's part of dQ, dK and dV."""
        dout, q, k, v, (lse, delta) = given
        dq, dk, dv = sums
        for queries, keys, hidden in _blocks(call, q.shape[2]):
            wide = wide_dtype(q.dtype)
            # P_ij = exp(s_ij - LSE_i) with the merged LSE: these keys' share of the whole softmax.
            weights = (self._scores(call, q[queries], k[keys], hidden) - lse[queries][..., None]).exp()
            # dP = dO Vᵀ, and the softmax gives dS = P ∘ (dP - delta).
            gradient = weights * (dout[queries].to(wide) @ v[keys].to(wide).mT - delta[queries][..., None])
            # O = P V  ⇒  dV = Pᵀ dO.
            dv[keys] += weights.mT @ dout[queries].to(wide)
            # S = scale·Q Kᵀ  ⇒  dQ = scale·dS K, dK = scale·dSᵀ Q.
            dq[queries] += call.scale * gradient @ k[keys].to(wide)
            dk[keys] += call.scale * gradient.mT @ q[queries].to(wide)

    @staticmethod
    def _scores(call: Call, q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
        """Return ``s = scale·q kᵀ``, with -inf for keys that the mask hides."""
        wide = wide_dtype(q.dtype)
        return (call.scale * q.to(wide) @ k.to(wide).mT).masked_fill(hidden.to(q.device), -torch.inf)


_Index = tuple[slice, slice, int]  # batch, rows, head


def _blocks(call: Call, heads: int) -> Iterator[tuple[_Index, _Index, Tensor]]:
    """Yield ``(query index, key index, hidden (queries, keys))`` of each (segment, query head) that has both."""
    piece, kv_heads = call.piece, len(call.offsets)
    for segment in range(piece.first_segment, piece.first_segment + piece.num_segments):
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            row, queries, first = piece.queries(segment, call.offsets[kv_head])
            key_row, keys, step = piece.keys(segment, call.offsets[kv_head])
            if not queries or not keys:
                continue
            # Query j and key i are counted from the segment's first kept row; a causal query sees the keys i <= j.
            index = torch.arange(first, first + queries)[:, None]
            hidden = torch.arange(keys) > (index if call.causal else keys)
            rate = piece.dilation_rate
            yield (
                (slice(None), slice(row, row + (queries - 1) * rate + 1, rate), head),
                (slice(None), slice(key_row, key_row + (keys - 1) * step + 1, step), kv_head),
                hidden.expand(queries, keys),
            )
