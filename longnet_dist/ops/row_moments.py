# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the gradient of a LayerNorm without weights needs of a row, from sums that each thread has."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add(a, b, c, d, w, x, y, z):
    return a + w, b + x, c + y, d + z


@triton.jit
def row_moments(a_sum, squares, dy_sum, products, eps, LENGTH: tl.constexpr):
    """Return μ, 1/σ, the mean of dy, and ``mean(dy∘y)/σ`` of ``y = (a - μ)/σ``.

    The arguments are sums of a, a², dy and dy∘a, whose totals are those of the row of ``LENGTH`` numbers.
    """
    # All averages at once: a row waits for its program's threads once. The difference σ² = mean(a²) - μ² loses little,
    # since the mean of a is not large against its deviation.
    mean, square, dy_mean, product = tl.reduce((a_sum, squares, dy_sum, products), 0, _add)
    mean, square, dy_mean, product = mean / LENGTH, square / LENGTH, dy_mean / LENGTH, product / LENGTH
    scale = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)  # 1/σ
    # With y = (a - μ)/σ: mean(dy∘y)/σ = (mean(dy∘a) - μ mean(dy))/σ².
    return mean, scale, dy_mean, (product - mean * dy_mean) * scale * scale
