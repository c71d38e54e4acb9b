"""A canary for memory: the tensors that the engine allocates on its hot path, by name and size.

A tensor with a few numbers for each token takes gigabytes in a long sequence. Whoever adds one has to add its name
here, and to the estimate of the memory (``longnet_dist/estimate/activations.py``).
"""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet_dist.attention import functional
from longnet_dist.engine.execution import Execution
from longnet_dist.model.longnet import LongNet
from tests.engine.test_block_run import model_config
from tests.estimate.live_bytes import LiveBytes
from tests.estimate.test_activations import BuffersOfTriton

TILE, DIM, FFN, HEADS, KV_HEADS = 60, 40, 56, 4, 2
HEAD_DIM = DIM // HEADS
HALF, FLOAT = 2, 4  # bytes of a number

# Bytes of each whole tensor for one token.
E = HALF * DIM
KV = HALF * KV_HEADS * HEAD_DIM
LSE = FLOAT * HEADS
STATISTICS = 2 * LSE
WIDE_DQ = FLOAT * DIM

FORWARD = {"q": E, "k": KV, "v": KV, "out": E, "lse": LSE, "z": E}
BACKWARD = {"dx": E, "dout": E, "dq": WIDE_DQ, "statistics": STATISTICS, "dk": KV, "dv": KV}
QKV = {"q": E, "k": KV, "v": KV}
AGAIN = QKV | {"out": E, "lse": LSE}

MODES = {
    "selective": (Execution("selective", tile=TILE), BACKWARD | QKV),
    "cached": (Execution("selective", tile=TILE, cache_qkv=2), BACKWARD),
    "full": (Execution("full", tile=TILE), BACKWARD | AGAIN),
    # What comes back from the host.
    "offloaded": (
        Execution("selective", tile=TILE, offload=True),
        BACKWARD | QKV | {"x": E, "saved out": E, "saved lse": LSE},
    ),
    "offloaded full": (Execution("full", tile=TILE, offload=True), BACKWARD | AGAIN | {"x": E}),
}


class Allocations(TorchDispatchMode):
    """Collects every storage that an operation inside makes, as its bytes and the shape of its first tensor."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.made.append((tensor.untyped_storage().nbytes(), tuple(tensor.shape)))
        return result

    def whole(self, rows):
        """Bytes for each token of the tensors that hold something of all ``rows``; weights and tiles are smaller."""
        return sorted(size / rows for size, _ in self.made if size >= rows * LSE)


@pytest.fixture(autouse=True)
def _buffers_of_a_gpu(monkeypatch):
    monkeypatch.setattr(functional, "choose_kernel", lambda *_: BuffersOfTriton())


def warm_block(execution, rows, **fields):
    """The first of two blocks after a step, so that tables, pinned memory and gradients exist; its input, ``dz``."""
    torch.manual_seed(0)
    config = model_config(dim=DIM, heads=HEADS, kv_heads=KV_HEADS, ffn_dim=FFN, layers=2, **fields)
    block = LongNet(config, execution=execution).to(torch.bfloat16).blocks[0]
    x = torch.randn(1, rows, DIM, dtype=torch.bfloat16, requires_grad=True)
    dz = torch.randn(1, rows, DIM, dtype=torch.bfloat16)
    block(x).backward(dz)
    x.grad = None
    return block, x, dz


@pytest.mark.parametrize("mode", MODES)
def test_whole_tensors(mode):
    execution, backward = MODES[mode]
    rows = 15 * TILE
    block, x, dz = warm_block(execution, rows)
    with Allocations() as forward:
        z = block(x)
    assert forward.whole(rows) == sorted(FORWARD.values())
    with Allocations() as made:
        z.backward(dz)
    assert made.whole(rows) == sorted(backward.values())


# The tensors alive at once at the worst moment of backward; z is the caller's. With "selective" that is the end of the
# attention's backward, with "full" its start, when the output is still needed and q, k, v exist already.
PEAKS = {
    "selective": {"z": E} | BACKWARD | QKV,
    "full": {"z": E} | AGAIN | {name: BACKWARD[name] for name in ("dx", "dout", "dq", "statistics")},
}


@pytest.mark.parametrize("mode", PEAKS)
def test_the_peak_grows_by_whole_tensors_alone(mode):
    """Per token, tiles cost nothing, and after a step only the output and the gradient of the input are left."""
    found = []
    for rows in (15 * TILE, 30 * TILE):
        block, x, dz = warm_block(MODES[mode][0], rows)
        with LiveBytes() as live:
            live.add([*block.parameters(), *(weight.grad for weight in block.parameters()), x, dz])
            live.add(list(block.self_attn.positions._cached[1]))
            before = live.now
            z = block(x)
            kept = live.now
            z.backward(dz)
            found.append([size - before for size in (kept, live.peak, live.now)])
    kept, peak, after = ((long - short) / (15 * TILE) for short, long in zip(*found, strict=True))
    assert kept == E + (E + LSE if mode == "selective" else 0)
    assert peak == sum(PEAKS[mode].values())
    assert after == 2 * E


# Tensors of a tile, by their numbers for each token. Each width is told apart by the sizes above.
MOST_OF_A_TILE = {
    "forward": {DIM: 7, FFN: 3, KV_HEADS * HEAD_DIM: 1},
    "backward": {DIM: 18, FFN: 6, KV_HEADS * HEAD_DIM: 1, DIM + 2 * KV_HEADS * HEAD_DIM: 1},
}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_tensors_of_a_tile(mode):
    """A tile more allocates so many tensors more; the counts are bounds, since another torch may need fewer."""
    counts = {}
    for tiles in (2, 3):
        block, x, dz = warm_block(MODES[mode][0], tiles * TILE, positions="none")
        with Allocations() as forward:
            z = block(x)
        with Allocations() as backward:
            z.backward(dz)
        for name, made in (("forward", forward), ("backward", backward)):
            shapes = [shape for _, shape in made.made if shape[:1] == (TILE,)]
            counts[name, tiles] = Counter(math.prod(shape) // TILE for shape in shapes)
    for name, most in MOST_OF_A_TILE.items():
        more = counts[name, 3] - counts[name, 2]
        wide = {width: count for width, count in more.items() if width > HEADS}
        assert wide, "the tiles were not found"
        assert all(count <= most.get(width, 0) for width, count in wide.items()), (name, wide)


@pytest.mark.parametrize("mode", MODES)
def test_steps_leave_nothing(mode):
    """From the second step on, a step allocates what the one before did and frees all of it."""
    block, x, dz = warm_block(MODES[mode][0], 10 * TILE)
    ends = []
    with LiveBytes() as live:
        for _ in range(4):
            live.peak = live.now
            block(x).backward(dz)
            x.grad = None
            ends.append((live.now, live.peak))
    assert len(set(ends[1:])) == 1, ends
