"""The kernels for Hopper in the emulator of ``tests/gluon``, against the definition in float64."""

import random
from unittest import mock

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from longnet_dist.attention import functional
from longnet_dist.attention.kernels.hopper import launches
from longnet_dist.attention.kernels.hopper.tables import listed_tiles, tile_table
from longnet_dist.attention.kernels.triton import kernel as portable
from longnet_dist.attention.module import DilatedAttention
from longnet_dist.attention.plan_ahead import plan_stream
from longnet_dist.attention.stream import Stream
from longnet_dist.caches import clear_caches
from longnet_dist.geometry.documents import Documents, segment_table
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Piece
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
        assert (a - b).norm() <= (1e-5 if place == 1 else 0.006) * b.norm() + 1e-4, place  # a row alone: gradient 0


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


@pytest.mark.parametrize(
    ("dim", "rows", "heads", "kv_heads", "lengths", "rates", "causal"),
    [
        (128, 300, 2, 1, [128, 256], [1, 2], True),
        (128, 190, 2, 2, [100], [2], False),
        (64, 300, 2, 2, [128, 256], [1, 2], True),
        (64, 290, 4, 2, [290], [1], False),
    ],
)
def test_deterministic_gradients_take_dk_and_dv_alone_from_it(dim, rows, heads, kv_heads, lengths, rates, causal):
    pattern, given, found = DilatedPattern(lengths, rates), inputs(rows, heads, kv_heads, dim), []
    for seed in range(2):  # in which the parts of the emulated machine take their turns
        kernel = EmulatedKernel(seed=seed)
        found.append(attended(*given, pattern, kernel, causal=causal, deterministic=True))
        assert kernel.launched["backward"] >= len(rates)
        assert kernel.launched["portable"] >= kernel.launched["backward"]
    check(found[0], expected(*given, pattern, causal))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


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


# Documents of one row or longer than every segment, edges at those of segments, padding on both sides, merged overlaps,
# shifted grids, last rows that the copy engine does not see.
@pytest.mark.parametrize(
    ("dim", "rows", "heads", "kv_heads", "edges", "lengths", "rates", "offsets", "shift", "causal"),
    [
        (128, 364, 2, 1, [0, 1, 130, 258, 364], [128, 256], [1, 2], "modulo", None, True),
        (128, 304, 2, 2, [3, 8, 130, 290, 300], [100, 200], [1, 2], "blocked", [30, 70], False),
        (128, 333, 2, 1, [0, 200, 333], [128, 256], [2, 4], "modulo", [64, 64], True),
        (64, 300, 2, 1, [5, 6, 140, 290], [64, 128, 256], [1, 2, 4], "modulo", [32, 32, 32], True),
        (64, 200, 2, 2, [0, 20, 200], [100], [2], "modulo", None, False),
    ],
)
def test_documents(dim, rows, heads, kv_heads, edges, lengths, rates, offsets, shift, causal):
    kernel, pattern = EmulatedKernel(), DilatedPattern(lengths, rates, offsets, shift)
    given = inputs(rows, heads, kv_heads, dim)
    actual = attended(*given, pattern, kernel, causal=causal, cu_seqlens=edges)
    check(actual, expected(*given, pattern, causal, edges))
    assert kernel.launched["backward"] > 0
    assert (kernel.launched["forward"] > 0) == (dim == 128)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_finite_padding_changes_no_bit(dim, causal):
    """The copy engine reads rows behind a document, which weigh nothing."""
    pattern, given, results = DilatedPattern([64, 128], [1, 2]), inputs(220, 1, 1, dim), []
    for number in (0.0, 1e4):
        for x in given:
            x[:, :3], x[:, 150:] = number, number
        kernel = EmulatedKernel()
        results.append(attended(*given, pattern, kernel, causal=causal, cu_seqlens=[3, 150]))
        assert kernel.launched["backward"] > 0
        assert (kernel.launched["forward"] > 0) == (dim == 128)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rows", [364, 363])  # of 363 the copy engine does not see the last
@pytest.mark.parametrize("dim", [64, 128])
def test_tiles_of_documents_are_listed_with_the_plan(dim, rows):
    """The launches of a batch find what another thread has worked out."""
    pattern, documents = DilatedPattern([64, 256], [1, 2]), Documents.of_edges([0, 50, 130, rows])
    attention, kernel = DilatedAttention(2 * dim, 2, pattern), EmulatedKernel()
    clear_caches()
    with (
        mock.patch.object(functional, "choose_kernel", return_value=kernel),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(portable, "_hopper", return_value=launches),
    ):
        stream = Stream(pattern, rows, 1, cu_seqlens=documents)
        plan_stream([attention], stream, rows, torch.bfloat16, torch.device("cpu"))
    planned = listed_tiles.cache_info().misses
    attended(*inputs(rows, 2, 2, dim), pattern, kernel, cu_seqlens=documents)
    found = listed_tiles.cache_info()
    assert planned == found.misses > 0
    assert found.hits > 0


def test_a_shifted_grid_without_documents():
    kernel, pattern = EmulatedKernel(), DilatedPattern([128, 256], [1, 2], shift=[64, 192])
    given = inputs(340, 2, 1, 128)
    check(attended(*given, pattern, kernel), expected(*given, pattern))
    assert kernel.launched["portable"] == 0


@pytest.mark.parametrize("dim", [64, 128])
def test_some_heads_of_a_model(dim):
    kernel, pattern = EmulatedKernel(), DilatedPattern([128, 256], [2, 4])
    given = inputs(270, 5, 5, dim)
    some = [x[:, :, 3:].contiguous() for x in given]
    actual = attended(*some, pattern, kernel, first_head=3, total_heads=5, cu_seqlens=[0, 100, 270])
    check(actual, [x[:, :, 3:] for x in expected(*given, pattern, True, [0, 100, 270])])
    assert kernel.launched["backward"] > 0


def test_documents_that_must_be_bitwise_what_they_are_alone_take_the_portable_kernels():
    kernel, pattern = EmulatedKernel(), DilatedPattern([64], [1])
    given = inputs(64, 1, 1, 128)
    attended(*given, pattern, kernel, cu_seqlens=[0, 30, 64], deterministic=True)
    assert kernel.launched["forward"] + kernel.launched["backward"] == 0


@pytest.mark.parametrize("half", [0, 96, -96])
@pytest.mark.parametrize("of_queries", [True, False])
def test_a_table_lists_the_tiles_that_have_work(half, of_queries):
    """Every tile in which some head has a query and a key, each once, and the longest segment first."""
    documents = Documents.of_edges([2, 3, 90, 700, 705, 1500])
    table, width, rate, rows = segment_table(documents, 256, 64), 256, 3, 16
    piece = Piece(0, width, rate, 0, len(table), 0, 2, 1500, 1500, False, half, table=table)
    found = tile_table(piece, of_queries, rows, False, torch.device("cpu"))
    segments = found.integers[: 3 * found.tiles].view(-1, 3)
    numbers = found.integers[3 * found.tiles :]
    listed = [(*map(int, segment), int(number)) for segment, number in zip(segments, numbers, strict=True)]
    assert len(set(listed)) == found.tiles
    wanted = set()
    for start, stop, lead in zip(table.starts, table.stops, table.leads, strict=True):
        middle = min(max(start + abs(half) - lead, start), stop)
        queries = range(middle if half > 0 else start, middle if half < 0 else stop)
        keys = range(middle if half < 0 else start, middle if half > 0 else stop)
        own = queries if of_queries else keys
        if len(queries) and len(keys):
            tiles = -(-len(own[::rate]) // rows)
            wanted |= {(int(start), int(stop), int(lead), number) for number in range(tiles)}
    assert set(listed) == wanted
    lengths = [stop - start for start, stop, _, _ in listed]
    assert lengths == sorted(lengths, reverse=True)


def random_edges(rng, rows, lengths):
    """Edges anywhere, or where segments begin, with documents of one row, and padding before and behind."""
    count = rng.randint(2, min(rows + 1, 7))
    edges = set(rng.sample(range(rows + 1), count))
    if rng.random() < 0.5:
        first = rng.randrange(rows)
        edges |= {first, first + 1}
    if rng.random() < 0.5:
        edges |= set(range(min(edges), max(edges) + 1, rng.choice(lengths)))
    return sorted(edges)


@pytest.mark.parametrize("seed", seeds(1, 100))
def test_random_documents(seed):
    dim, rows, heads, kv_heads, batch, pattern, causal = random_problem(seed)
    rng = random.Random(seed)
    lengths = pattern.segment_lengths
    if seed % 2:
        shift = rng.randrange(min(lengths)) // 4 * 4
        shifts = [shift] * len(lengths) if rng.random() < 0.5 else [rng.randrange(width) for width in lengths]
        pattern = DilatedPattern(lengths, pattern.dilation_rates, pattern.head_offsets, shifts)
    edges = random_edges(rng, rows, lengths)
    given = inputs(rows, heads, kv_heads, dim, batch, seed=seed)
    kernel = EmulatedKernel(seed=seed)
    check(attended(*given, pattern, kernel, causal=causal, cu_seqlens=edges), expected(*given, pattern, causal, edges))


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
