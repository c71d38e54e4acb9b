r"""Sinks: one more key in every softmax, whose value is 0.

A sink :math:`\sigma` is the logarithm of that key's weight. It scales the output of a (row, head) and enters its
log-sum-exp:

.. math::
    \mathrm{LSE}' = \log(e^{\mathrm{LSE}} + e^{\sigma}), \qquad
    O' = O\, e^{\mathrm{LSE} - \mathrm{LSE}'} = O\,\mathrm{sigmoid}(\mathrm{LSE} - \sigma).

The mixture of the branches is one softmax, so the sink joins it once, after all branches. The backward of every branch
is then the ordinary one with the merged :math:`(O', \mathrm{LSE}')`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.documents import as_integer
from longnet_dist.geometry.pattern import DilatedPattern, check_heads, check_pattern, kept_rows

_TILE_ROWS = 65536
"""Rows whose products are summed at once, so that no wide copy of the whole output is made."""


def check_sink(sink: Tensor | None, q: Tensor) -> None:
    """Raise ShapeError unless ``sink`` is ``(H,)``, ``(n, H)`` or ``(B, n, H)`` for queries ``q (B, n, H, D)``."""
    if sink is None:
        return
    batch, rows, heads, _ = q.shape
    if tuple(sink.shape) not in ((heads,), (rows, heads), (batch, rows, heads)):
        raise ShapeError(
            f"a sink must be (heads,), (rows, heads) or (batch, rows, heads), here ({heads},), ({rows}, {heads}) or "
            f"({batch}, {rows}, {heads}), but is {tuple(sink.shape)}; expand or transpose it"
        )
    if not sink.is_floating_point() or sink.device != q.device:
        raise ShapeError(
            f"a sink must be of a floating-point dtype on the device of q, {q.device}, but is {sink.dtype} on "
            f"{sink.device}; convert or move it"
        )


def join_sink(out: Tensor, lse: Tensor, sink: Tensor, padding: Sequence[slice] = ()) -> None:
    """Let ``sink`` join the softmax of ``out (B, n, H, D)`` and ``lse (B, n, H)``, in place; not in ``padding``."""
    # LSE' = ln(e^LSE + e^σ) with the sink's score σ.
    merged = torch.logaddexp(lse, sink.detach().to(lse.dtype))
    # O' = e^(LSE - LSE') O: the keys keep this share of the softmax, and the sink's value is 0.
    # Where neither a key nor a sink is, both are -inf and their difference is NaN; the output is 0 there.
    share = (lse - merged).exp_().nan_to_num_(nan=0.0)
    out.mul_(share.unsqueeze(-1))
    lse.copy_(merged)
    for rows in padding:
        lse[:, rows] = -torch.inf


def delta_of(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    r"""Return ``delta = rowsum(dO ∘ O) - dlse (B, n, H)`` in the dtype of ``lse``.

    With :math:`S` the scores and :math:`P = e^{S - \mathrm{LSE}}`, :math:`∂\mathrm{LSE}/∂S = P`. A gradient of the
    log-sum-exp therefore adds :math:`P ∘ \mathrm{dlse}` to :math:`dS = P ∘ (dO\,V^\top - \mathrm{delta})`.
    Where there is no key, the log-sum-exp is ``-inf`` and has no gradient.
    """
    tiles = zip(torch.split(dout, _TILE_ROWS, 1), torch.split(out, _TILE_ROWS, 1), strict=True)
    # rowsum(dO ∘ O), in the wide dtype from the narrow factors.
    delta = torch.cat([(x.to(lse.dtype) * y.to(lse.dtype)).sum(-1) for x, y in tiles], 1)
    return delta if dlse is None else delta - dlse.masked_fill(lse == -torch.inf, 0.0)


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    r"""Return the gradient of ``sink``, in its shape and dtype; ``lse`` contains the sink.

    The sink is a key of score σ and value 0. Its :math:`P = e^{σ - \mathrm{LSE}'}` and :math:`dO\,V^\top = 0`, so
    :math:`dσ = P (0 - \mathrm{delta})`.
    """
    # P = e^(σ - LSE') of each row, then dσ = -P delta, summed over the rows that share a sink.
    weight = (sink.to(lse.dtype) - lse).exp().masked_fill(lse == -torch.inf, 0.0)  # padding, or no sink and no key
    return (-weight * delta).sum_to_size(sink.shape).to(sink.dtype)


def phantom_keys(pattern: DilatedPattern, N: int, heads: int, kv_heads: int | None = None) -> Tensor:
    r"""Return torchscale's zero keys as a sink.

    torchscale fills the last segment of a branch with zero rows up to :math:`\min(w, N)`, and every segment up to a
    multiple of :math:`r`. Bidirectional models attend to these rows: keys of score 0 and value 0. Together they are a
    sink, the logarithm of their number over all branches that keep a (row, head).

    Args:
        pattern: the branches.
        N: tokens of the sequence.
        heads: query heads ``H``.
        kv_heads: key/value heads, ``H`` if not given; the heads of a group share their number.

    Packed documents have those of each, one after another.

    Returns:
        ``(N, H)`` float32: natural logarithms, ``-inf`` where there is no such key.

    Raises:
        ConfigError: no tokens, heads that do not divide, or a shifted grid, which torchscale does not have.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    check_pattern(pattern)
    check_heads(heads, kv_heads)
    if (as_integer(N) or 0) < 1:
        raise ConfigError(f"a sequence needs at least one token, but N is {N!r}; give the number of its tokens")
    if pattern.shifted:
        raise ConfigError(
            f"torchscale's zero keys fill segments that begin at row 0, but the pattern has "
            f"shift={list(pattern.shift)}; use a pattern without shift"
        )
    numbers = torch.zeros(kv_heads, N)
    for branch in pattern:
        width, rate = min(branch.segment_length, N), branch.dilation_rate
        filled = -(-width // rate)  # rows of a filled segment that a head keeps
        first = (N - 1) // width * width  # row of the last segment
        for head, offset in enumerate(pattern.offsets(branch, kv_heads)):
            whole, short = (filled - kept_rows(length, offset, rate) for length in (width, N - first))
            # A head's numbers, segment by segment; it keeps every r-th row of each.
            numbers[head, :first].view(-1, width)[:, offset::rate] += whole
            numbers[head, first + offset :: rate] += short
    return numbers.log_().repeat_interleave(heads // kv_heads, dim=0).T.contiguous()
