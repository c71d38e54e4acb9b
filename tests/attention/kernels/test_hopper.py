"""The kernels for Hopper in the emulator of ``tests/gluon``, against the definition in float64."""

import random

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from longnet_dist.attention.stream import Stream
from longnet_dist.geometry.pattern import DilatedPattern
from tests.cases import seeds
from tests.gluon.attention import EmulatedKernel, attended, expected, inputs

# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 1.25 and later warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU"),
]


def check(actual, wanted):
    """Each within the rounding of bfloat16, lse within that of float32."""
    for place, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert torch.equal(a.isinf(), b.isinf())
        a, b = (torch.where(x.isinf(), 0.0, x.double()) for x in (a, b))
        assert (a - b).norm() <= (1e-5 if place == 1 else 0.004) * b.norm(), place


# Ragged tiles, offsets of both rules, grouped heads, both masks, merged overlaps, a batch.
@pytest.mark.parametrize(
    ("dim", "rows", "heads", "kv_heads", "batch", "lengths", "rates", "offsets", "causal"),
    [
        (128, 200, 2, 1, 1, [150], [1], "modulo", True),
        (128, 190, 2, 2, 2, [100], [2], "blocked", False),
        (128, 300, 2, 1, 1, [128, 256], [1, 2], "modulo", True),
        (128, 300, 2, 2, 1, [128, 256], [1, 2], "modulo", False),
        (64, 200, 2, 1, 1, [150], [1], "modulo", True),
        (64, 270, 3, 3, 1, [130], [3], "modulo", False),
        (64, 300, 2, 2, 1, [128, 256], [1, 2], "modulo", True),
    ],
)
def test_agrees_with_the_oracle(dim, rows, heads, kv_heads, batch, lengths, rates, offsets, causal):
    kernel, pattern = EmulatedKernel(), DilatedPattern(lengths, rates, offsets)
    given = inputs(rows, heads, kv_heads, dim, batch)
    check(attended(*given, pattern, kernel, causal=causal), expected(*given, pattern, causal))
    assert kernel.launched["backward"] >= len(rates)
    assert (kernel.launched["forward"] > 0) == (dim == 128)


@pytest.mark.parametrize("causal", [True, False])
def test_a_program_of_several_tiles(causal):
    """As where there are so many programs that each takes four tiles of queries, one after the other."""
    kernel, pattern = EmulatedKernel(turns=True), DilatedPattern([600, 600], [1, 2])
    given = inputs(600, 1, 1, 128)
    check(attended(*given, pattern, kernel, causal=causal), expected(*given, pattern, causal))
    assert kernel.forward_kernel.programs < 5


@pytest.mark.parametrize("rise", [8, -8])
def test_scores_of_any_size(rise):
    """Scores that rise or fall by hundreds within a row: a kept maximum does not hold, and the tile comes again."""
    rows = 260
    q, k, v, dout = inputs(rows, 1, 1, 128)
    ramp = torch.linspace(-rise, rise, rows, dtype=q.dtype)[None, :, None, None]
    given, pattern = (q.abs() * 4, k.abs() * ramp, v, dout), DilatedPattern([150, rows], [1, 2])
    actual, wanted = attended(*given, pattern, EmulatedKernel(), causal=False), expected(*given, pattern, False)
    assert (actual[0] - wanted[0]).norm() < 0.006 * wanted[0].norm()


@pytest.mark.parametrize("dim", [64, 128])
def test_keys_from_compact_buffers(dim):
    rows, pattern = 256, DilatedPattern([64, 128, 256], [1, 2, 4])
    q, k, v, dout = inputs(rows, 2, 1, dim)
    stream, kernel, outputs, leaves = Stream(pattern, rows, 1), EmulatedKernel(), [], []
    wanted = expected(q, k, v, dout, pattern)
    for shards in stream.forward(100):
        local = slice(*shards.window(0))
        parts = [x[:, local].contiguous() for x in (q, k, v, dout)]
        outputs.append(attended(*parts, pattern, kernel, cache=stream.layers[0])[0])
        leaves.append(local)
    assert (torch.cat(outputs, 1) - wanted[0]).norm() < 0.004 * wanted[0].norm()
    assert len(leaves) == 3
    assert kernel.launched["backward"] > 3


def random_problem(seed):
    rng = random.Random(seed)
    dim, rows = rng.choice([64, 128]), rng.randint(1, 400)
    kv_heads, group = rng.randint(1, 3), rng.choice([1, 1, 2])
    if rng.random() < 0.5:
        width, rate = rng.choice([64, 96, 128]), rng.choice([1, 2, 3])
        lengths, rates = [width, 2 * width, 4 * width], [rate, 2 * rate, 4 * rate]
    else:
        lengths = [rng.randint(1, rows + 50) for _ in range(rng.randint(1, 3))]
        rates = [rng.randint(1, 5) for _ in lengths]
    pattern = DilatedPattern(lengths, rates, rng.choice(["modulo", "blocked"]))
    return dim, rows, kv_heads * group, kv_heads, rng.randint(1, 2), pattern, rng.random() < 0.5


@pytest.mark.parametrize("seed", seeds(1, 60))
def test_random_problems(seed):
    dim, rows, heads, kv_heads, batch, pattern, causal = random_problem(seed)
    given = inputs(rows, heads, kv_heads, dim, batch, seed=seed)
    kernel = EmulatedKernel(seed=seed, turns=seed % 2)
    check(attended(*given, pattern, kernel, causal=causal), expected(*given, pattern, causal))
